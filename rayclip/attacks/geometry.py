"""Perturbations in l_inf and l_2 balls, inside the range of pixels: starts, steps, projections; and the margin.

Shapes: A samples, B batch, C H W image, K classes.
"""

import torch
from torch import Tensor

from rayclip import rng
from rayclip.types import UserError
from rayclip.units import Norm

_ROUNDING = 1e-6  # tolerance for pixels that were normalised and mapped back


def check_pixels(images_BCHW: Tensor) -> None:
    """Raise a `UserError` unless all pixels lie in [0, 1], up to rounding. Waits for the device once."""
    if not images_BCHW.numel():
        return
    low, high = torch.stack(images_BCHW.detach().aminmax()).tolist()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails both comparisons
        raise UserError(
            f"images have pixels from {low:.3g} to {high:.3g}, and attacks take pixels in [0, 1]: divide bytes by 255, "
            "and leave normalisation to the model."
        )


def random_start(clean: Tensor, keys: Tensor, eps: float, norm: Norm, *, stream: int = 0) -> Tensor:
    """Return a random perturbation of each image that depends on its key and `stream` alone (l2 uses three streams).
    linf: uniform in the ball; l2: gaussian direction and uniform radius. Clipped so that images stay in [0, 1]."""
    shape, dtype = tuple(clean.shape[1:]), clean.dtype
    if norm == "linf":
        delta = (2 * rng.uniform(keys, shape, stream=stream, dtype=dtype) - 1) * eps
    else:
        direction = rng.gaussian(keys, shape, stream=stream, dtype=dtype)
        radius = rng.uniform(keys, (1, 1, 1), stream=stream + 2, dtype=dtype) * eps
        delta = direction / _norms(direction) * radius
    return _into_range(delta, clean)


def advance(
    delta: Tensor, direction: Tensor, clean: Tensor, length: float, eps: float, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Take a step of this length, project it; return the perturbations and the images `clean + delta`."""
    if norm == "linf" and clean.is_cuda:
        bounds = (torch.full((1,), number, dtype=clean.dtype, device=clean.device) for number in (length, eps))
        moved, pixels = _advance_linf(*(x.reshape(-1) for x in (delta, direction, clean)), *bounds)
        return moved.view_as(clean), pixels.view_as(clean)
    delta = project(delta + length * steepest(direction, norm), clean, eps, norm)
    return delta, (clean + delta).clamp(0, 1)  # the sum may round slightly beyond the range


@rng.fused
def _advance_linf(
    delta: Tensor, direction: Tensor, clean: Tensor, length: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """`advance` on flat tensors, which one compilation serves whatever the images' shape."""
    delta = _into_range((delta + length * direction.sign()).clamp(-eps, eps), clean)
    return delta, (clean + delta).clamp(0, 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the direction of unit length in which a linear loss rises most."""
    return (
        gradient.sign() if norm == "linf" else gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    )


def project(delta: Tensor, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Project onto the eps ball, then clip so that clean + delta lies in [0, 1]."""
    if norm == "linf":
        return _into_range(delta.clamp(-eps, eps), clean)
    return _into_range(delta * (eps / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1), clean)


def _into_range(delta: Tensor, clean: Tensor) -> Tensor:
    """Clip so that clean + delta lies in [0, 1]; this moves no coordinate away from 0, so delta stays in its ball."""
    return (clean + delta).clamp(0, 1) - clean


def margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return z_y minus the largest other logit, `(B,)`; positive if the prediction is right."""
    own = logits_BK.gather(1, labels_B[:, None]).squeeze(1)
    others = logits_BK.scatter(1, labels_B[:, None], -torch.inf)
    return own - others.amax(1)


def per_image(x_A: Tensor) -> Tensor:
    """Reshape one number per image to `(A, 1, 1, 1)`, so that it scales images."""
    return x_A.view(-1, 1, 1, 1)


def sizes(deltas: Tensor, norm: Norm) -> Tensor:
    """Return the norms of perturbations `(A, ...)`, `(A,)`."""
    return deltas.flatten(1).norm(dim=1) if norm == "l2" else deltas.flatten(1).abs().amax(1)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

"""Weight interpolation between a model and its fine-tuned version: `θ(a) = (1-a)·θ₀ + a·θ_ft` (MMCoA, figure 8)."""

from typing import Any

from torch import Tensor

from rayclip.models.clip import Clip
from rayclip.models.prompts import Prompted
from rayclip.types import UserError


def mix(start: Clip, end: Clip, a: float, spec: str) -> Clip:
    """Return the model `(1-a)·start + a·end`, which may share weights with these; at a = 0 and a = 1 its weights equal
    that end's, bit for bit.

    Args:
        spec: `mix:START+END@a`, for messages.

    Raises:
        UserError: a model with a learned prompt, or two models of different architecture.
    """
    for clip in (start, end):
        if isinstance(clip, Prompted):
            raise UserError(
                f"'{spec}': {clip.spec} is a learned prompt, whose model has the weights that it had before."
            )
    if _architecture(start) != _architecture(end):
        raise UserError(
            f"'{spec}': {start.spec} and {end.spec} differ in architecture, activation or preprocessing; only a model "
            "and what was fine-tuned from it can be interpolated."
        )
    mixed = end if a == 1 else start
    if 0 < a < 1:
        theta_0, theta_ft = start.model.state_dict(), end.model.state_dict()
        mixed.model.load_state_dict({name: interpolate(theta_0[name], theta_ft[name], a) for name in theta_0})
    mixed.spec = spec
    return mixed


def interpolate(start: Tensor, end: Tensor, a: float) -> Tensor:
    """Return `(1-a)·start + a·end`, any shape; counters (integers) stay those of the start."""
    return (1 - a) * start + a * end if start.is_floating_point() else start


def _architecture(clip: Clip) -> list[Any]:
    """Return a description that is equal for models whose weights have the same meaning, however their configurations
    are written."""
    return [
        [(name, tensor.shape) for name, tensor in clip.model.state_dict().items()],
        [(type(module).__name__, getattr(module, "num_heads", None)) for module in clip.model.modules()],
        clip.image_size,
        clip.mean.tolist(),
        clip.std.tolist(),
    ]

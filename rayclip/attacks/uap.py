"""A universal perturbation: one image from a file, added to every image; and the making of one.

Shapes: B batch, C H W image, D embedding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, ClassVar, Literal, Self
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from rayclip.attacks.base import Adversarial, Attack, Prompts, Samples
from rayclip.attacks.geometry import margin, per_image
from rayclip.models import ZeroShot
from rayclip.models.sizes import is_whole
from rayclip.models.weights import read_pickle, read_safetensors, sha256
from rayclip.settings import FILLED_IN
from rayclip.store import Store
from rayclip.types import UserError, check_same

Objective = Literal["embedding", "labels"]


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation(Attack):
    """x + d with one d for all images, clipped to the eps ball and the image range (X-Transfer, ICML 2025). A d of
    another size than the image is resized bilinearly.

    Attributes:
        file: d in pixel units, `(3, H, W)` or `(1, 3, H, W)`: .npy, .pt, or .safetensors with one tensor or `delta`;
            every worker has to see it.
        fit: what a budget does to d: `clip` its values, or `scale` them so that the largest is eps.
    """

    name: ClassVar[str] = "uap"
    black_box: ClassVar[bool] = True
    asks_victim: ClassVar[bool] = False

    file: str = ""
    fit: Literal["clip", "scale"] = "clip"
    fingerprint: str = field(default="", metadata=FILLED_IN)

    def __post_init__(self) -> None:
        if not self.file:
            raise UserError("uap needs the perturbation to add: write uap:file=FILE, as rayclip uap makes one.")

    @property
    def label(self) -> str:
        return f"{self.name}_{Path(self.file).stem}"

    def pinned(self) -> Self:
        return self if self.fingerprint else replace(self, fingerprint=_digest(self.file))

    def describe(self) -> dict[str, Any]:
        """Return the settings; `file` is a hash of the perturbation."""
        return {"file": self.pinned().fingerprint, "fit": self.fit}

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        images = samples.images_BCHW
        delta = _load(self.file, self.fingerprint).to(images.device, images.dtype, non_blocking=True)[None]
        if self.fit == "scale":
            delta = delta * (eps / delta.abs().amax().clamp_min(torch.finfo(delta.dtype).tiny))
        if delta.shape[-2:] != images.shape[-2:]:
            delta = F.interpolate(delta, size=images.shape[-2:], mode="bilinear", align_corners=False)
        moved = (images + delta.clamp(-eps, eps)).clamp(0, 1)
        if samples.todo_B is not None:
            moved = torch.where(per_image(samples.todo_B), moved, images)
        return Adversarial.untouched(images)._replace(images_BCHW=moved)


def ascend_together(
    victim: ZeroShot,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    shape: tuple[int, ...],
    *,
    eps: float,
    step: float,
    epochs: int,
    seed: int = 0,
    objective: Objective = "embedding",
) -> Tensor:
    """Return a universal perturbation `(C, H, W)` of the images: signed steps along the gradient summed over a batch.

    Args:
        batches: (number of the epoch) -> batches of pixels `(B, C, H, W)` in [0, 1] and labels `(B,)`.
        objective: `embedding` lowers the cosine to the clean embedding, without labels (X-Transfer's loss with one
            model); `labels` lowers the margin of images that are still right.
    """
    device = victim.clip.device
    start = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    delta = ((2 * start - 1) * eps).to(device)  # at 0 the cosine is at its maximum and its gradient vanishes
    for epoch in range(epochs):
        for pixels_BCHW, labels_B in batches(epoch):
            moved = delta.clone().requires_grad_()
            with torch.enable_grad():
                image_BD = victim.embed((pixels_BCHW + moved).clamp(0, 1))
                if objective == "labels":
                    loss = -margin(victim.logits(image_BD), labels_B).relu().sum()
                else:
                    with torch.no_grad():
                        clean_BD = victim.embed(pixels_BCHW)
                    loss = -(image_BD * clean_BD).sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            delta = (delta + step * gradient.sign()).clamp(-eps, eps)
    return delta


def save_perturbation(delta_CHW: Tensor, place: Path) -> None:
    """Write a perturbation as .safetensors, atomically."""
    Store(str(place.parent.absolute())).write(place.name, save({"delta": delta_CHW[None].cpu().contiguous()}))


def _digest(file: str) -> str:
    try:
        return sha256(Path(file).expanduser())[:16]
    except OSError as error:
        raise UserError(f"uap:file={file} cannot be read ({error.strerror or error}): name a file.") from None


# Errors that numpy's reader raises for damaged files, whose header is Python's syntax
_DAMAGE = (OSError, ValueError, TypeError, OverflowError, EOFError, SyntaxError, TokenError, BadZipFile)


@lru_cache(maxsize=4)
def _load(file: str, fingerprint: str) -> Tensor:
    """Return the perturbation, `(3, H, W)`."""
    path = Path(file).expanduser()
    if fingerprint:
        check_same("perturbation", file, _digest(file), fingerprint)
    try:
        if path.suffix == ".npy":
            # Mapped, since the size that a header claims is otherwise believed
            found: Any = torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
        else:
            found = (read_safetensors if path.suffix == ".safetensors" else read_pickle)(path)
    except (*_DAMAGE, UserError) as error:
        raise UserError(f"uap:file={file} holds no perturbation ({error}): give .npy, .pt or .safetensors.") from None
    if isinstance(found, dict):
        found = found.get("delta", next(iter(found.values())) if len(found) == 1 else None)
    whole = isinstance(found, Tensor) and is_whole(found) and found.ndim in (3, 4) and found.shape[-3] == 3
    if not whole or (found.ndim == 4 and len(found) != 1):
        raise UserError(f"uap:file={file} holds no perturbation: it has to be one tensor (3, H, W) or (1, 3, H, W).")
    delta = found.float().reshape(found.shape[-3:])
    if not (delta.isfinite().all() and delta.abs().max() <= 1):
        raise UserError(f"uap:file={file} is not in pixel units of [-1, 1]: divide bytes by 255.")
    return delta

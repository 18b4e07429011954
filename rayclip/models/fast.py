"""A copy of a model for attacks: its image tower in reduced precision, or compiled, or both.

The copy's weights are cast once (autocast would cast frozen ones again at every call). Pixels and embeddings stay fp32,
and so do normalisation, text tower, class weights, logits, losses and perturbations. An adversarial example found on
such a copy only counts once the model itself has confirmed it (`evaluation.confirm`).

Shapes: B batch, C channels, H W image, D embedding.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.clip import Clip, frozen
from rayclip.models.image import class_token_tower, encode_class_token
from rayclip.types import UserError

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEAR = 0.9  # smallest cosine of two embeddings that differ by rounding only, even in the deepest towers
_SMALLEST = 8  # smallest batch of a compiled tower, and smallest step between batch sizes


def fast_copy(clip: Clip, precision: Precision = "fp32", *, compiled: bool = False, backend: str = "inductor") -> Clip:
    """Return `clip` with a separate image tower for attacks; all else is shared. Gradients reach the pixels only.

    Args:
        compiled: compile the tower with torch.compile at its first use, with CUDA graphs on a GPU.
        backend: of torch.compile.

    Raises:
        UserError: the image tower has custom parts that do not compute in `precision` what they do in fp32.
    """
    copied, model = _shallow(clip), _shallow(clip.model)
    is_stock = class_token_tower(clip.model) is not None
    try:
        tower = _Tower(clip.model.visual, is_stock, _DTYPES[precision], compiled, backend)  # type: ignore[arg-type]
        model.visual, copied.model = tower, model
        fits = is_stock or _near(clip, tower)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # from hooks that get unexpected tensors
        fits = False
    if not fits:
        raise UserError(
            f"the image tower of '{clip.spec}' has parts of its own (hooks, adapters, patched methods) that do not "
            f"compute in {precision} what they do in fp32: use precision fp32."
        )
    return copied


@torch.no_grad()
def _near(clip: Clip, tower: "_Tower") -> bool:
    """Return whether a copied tower embeds two images of noise about as the model's own does."""
    noise = torch.rand(2, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))
    x_BCHW = clip.tower_input(noise.to(clip.mean))
    with frozen(clip):  # in train mode a forward pass would change batch statistics
        own, copied = clip.model.visual(x_BCHW), tower.visual(x_BCHW.to(tower.dtype))  # type: ignore[operator]
    own, copied = (out[0] if isinstance(out, tuple) else out for out in (own, copied))
    return bool(F.cosine_similarity(own.float(), copied.float()).min() > _NEAR)


def _shallow(module: Any) -> Any:
    """Return a module with the same children, weights and attributes; its children may be replaced."""
    shared = [*module.children(), *module.parameters(recurse=False), *module.buffers(recurse=False)]
    shared += [value for value in vars(module).values() if not isinstance(value, dict)]
    return copy.deepcopy(module, {id(each): each for each in shared})


class _Tower(nn.Module):
    """Image tower in reduced precision; inputs and outputs stay fp32."""

    def __init__(self, visual: nn.Module, is_stock: bool, dtype: torch.dtype, compiled: bool, backend: str) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual).to(dtype).eval().requires_grad_(False)
        self.dtype, self.compiled = dtype, compiled
        embed: Callable[[Tensor], Any] = functools.partial(encode_class_token, self.visual) if is_stock else self.visual
        if compiled:
            graphs = backend == "inductor" and next(visual.parameters()).is_cuda
            # torch makes one graph for the first size of a batch and one for all others; CUDA graphs are one per size
            embed = torch.compile(embed, backend=backend, mode="reduce-overhead" if graphs else None)
        self._embed = embed

    def forward(self, pixels_BCHW: Tensor) -> Any:
        count, sizes = len(pixels_BCHW), list[Tensor]()
        if self.compiled:
            pixels_BCHW = F.pad(pixels_BCHW, (0, 0, 0, 0, 0, 0, 0, padded(count) - count))
        reduced = _Enter.apply(pixels_BCHW, self.dtype, sizes)
        out = self._embed(reduced)
        if isinstance(out, tuple):  # CoCa's tower returns its tokens, too
            return _Leave.apply(out[0], sizes)[:count], *(rest[:count] for rest in out[1:])
        return _Leave.apply(out, sizes)[:count]


def padded(count: int) -> int:
    """Return the size to which a batch is padded: decided images leave an attack one by one, and a graph needs few
    sizes.

    There are four sizes between a power of two and the next, so that above the smallest sizes padding adds at most a
    quarter.
    """
    step = max(_SMALLEST, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


class _Enter(torch.autograd.Function):
    """Cast to the tower's precision; the gradient comes back in fp32, multiplied by the size that `_Leave` divided it
    by."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, dtype: torch.dtype, sizes: list[Tensor]) -> Tensor:
        ctx.sizes = sizes
        return pixels.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.float() * ctx.sizes[-1].view(-1, 1, 1, 1), None, None


class _Leave(torch.autograd.Function):
    """Cast back to fp32, in memory that the tower does not reuse. Backward scales each image's gradient to size 1, as
    half precision would lose the small gradients of images that are far from misclassified."""

    @staticmethod
    def forward(ctx: Any, embedded_BD: Tensor, sizes: list[Tensor]) -> Tensor:
        ctx.sizes, ctx.dtype = sizes, embedded_BD.dtype
        return embedded_BD.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        size_B1 = gradient_BD.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        ctx.sizes[:] = [size_B1]
        return (gradient_BD / size_B1).to(ctx.dtype), None

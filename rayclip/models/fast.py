"""A copy of a model for attacks: its image tower in reduced precision, or compiled, or both.

The copy's weights are cast once (autocast would cast frozen ones again at every call). Pixels come and embeddings go
in fp32: normalisation, text tower, class weights, logits, losses and perturbations stay what they are. What an attack
finds on such a copy is worth something once the model itself has confirmed it (`evaluation.confirm`).

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
_NEAR = 0.9  # cosine of two embeddings that differ by rounding, at least, in the deepest of towers too
_SMALLEST = 8  # images in a batch of a compiled tower, at least and in steps of at least


def fast_copy(clip: Clip, precision: Precision = "fp32", *, compiled: bool = False, backend: str = "inductor") -> Clip:
    """`clip` with an image tower of its own for attacks; all else is shared. Gradients reach the pixels only.

    Args:
        compiled: the tower goes through torch.compile at its first use, with CUDA graphs on a GPU.
        backend: of torch.compile.

    Raises:
        UserError: the image tower has parts of its own that do not compute in `precision` what they do in fp32.
    """
    copied, model = _shallow(clip), _shallow(clip.model)
    is_stock = class_token_tower(clip.model) is not None
    try:
        tower = _Tower(clip.model.visual, is_stock, _DTYPES[precision], compiled, backend)  # type: ignore[arg-type]
        model.visual, copied.model = tower, model
        fits = is_stock or _near(clip, tower)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # what a hook may do with tensors it does not expect
        fits = False
    if not fits:
        raise UserError(
            f"the image tower of '{clip.spec}' has parts of its own (hooks, adapters, patched methods) that do not "
            f"compute in {precision} what they do in fp32: use precision fp32."
        )
    return copied


@torch.no_grad()
def _near(clip: Clip, tower: "_Tower") -> bool:
    """Whether a copied tower embeds two images of noise about as the model's own does."""
    noise = torch.rand(2, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))
    x_BCHW = clip.tower_input(noise.to(clip.mean))
    with frozen(clip):  # in train mode batch statistics would be changed by a look
        own, copied = clip.model.visual(x_BCHW), tower.visual(x_BCHW.to(tower.dtype))  # type: ignore[operator]
    own, copied = (out[0] if isinstance(out, tuple) else out for out in (own, copied))
    return bool(F.cosine_similarity(own.float(), copied.float()).min() > _NEAR)


def _shallow(module: Any) -> Any:
    """A module with the same children, of which some may then be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


class _Tower(nn.Module):
    """An image tower of another precision behind fp32 doors."""

    def __init__(self, visual: nn.Module, is_stock: bool, dtype: torch.dtype, compiled: bool, backend: str) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual).to(dtype).eval().requires_grad_(False)
        self.dtype, self.compiled = dtype, compiled
        embed: Callable[[Tensor], Any] = functools.partial(encode_class_token, self.visual) if is_stock else self.visual
        if compiled:
            graphs = backend == "inductor" and next(visual.parameters()).is_cuda
            embed = torch.compile(embed, backend=backend, mode="reduce-overhead" if graphs else None)
        self._embed = embed

    def forward(self, pixels_BCHW: Tensor) -> Any:
        count, sizes = len(pixels_BCHW), list[Tensor]()
        if self.compiled:
            pixels_BCHW = F.pad(pixels_BCHW, (0, 0, 0, 0, 0, 0, 0, padded(count) - count))
        reduced = _Enter.apply(pixels_BCHW, self.dtype, sizes)
        if self.compiled:  # one graph for all sizes; CUDA graphs are recorded once for each
            torch._dynamo.maybe_mark_dynamic(reduced, 0)
        out = self._embed(reduced)
        if isinstance(out, tuple):  # CoCa's tower gives its tokens too
            return _Leave.apply(out[0], sizes)[:count], *(rest[:count] for rest in out[1:])
        return _Leave.apply(out, sizes)[:count]


def padded(count: int) -> int:
    """The size to which a batch is filled up: decided images leave an attack one by one, and a graph wants few sizes.

    Four sizes between a power of two and the next, so that at most a quarter is filled up beyond the smallest sizes.
    """
    step = max(_SMALLEST, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


class _Enter(torch.autograd.Function):
    """Into the tower's precision; the gradient comes back in fp32 and gets back the size that `_Leave` took off."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, dtype: torch.dtype, sizes: list[Tensor]) -> Tensor:
        ctx.sizes = sizes
        return pixels.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.float() * ctx.sizes[-1].view(-1, 1, 1, 1), None, None


class _Leave(torch.autograd.Function):
    """Out of the tower's precision, in memory that the tower will not use again; each image's gradient is brought to
    size 1 on its way in, where half precision would lose the small gradients of images that are far from broken."""

    @staticmethod
    def forward(ctx: Any, embedded_BD: Tensor, sizes: list[Tensor]) -> Tensor:
        ctx.sizes, ctx.dtype = sizes, embedded_BD.dtype
        return embedded_BD.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        size_B1 = gradient_BD.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        ctx.sizes[:] = [size_B1]
        return (gradient_BD / size_B1).to(ctx.dtype), None

"""A copy of a model for attacks: its image tower in reduced precision, or compiled, or both.

The copy's weights are cast once (autocast would cast frozen ones again at every call); in training, once a step
(`refresh`). Pixels and embeddings stay fp32, and so do normalisation, text tower, class weights, logits, losses and
perturbations. An adversarial example found on such a copy only counts once the model itself has confirmed it
(`evaluation.confirm`).

Shapes: B batch, C channels, H W image, D embedding.
"""

import contextlib
import copy
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip import rng
from rayclip.models.clip import Clip, frozen
from rayclip.models.image import class_token_tower, encode_class_token
from rayclip.types import UserError

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEAR = 0.9  # smallest cosine of two embeddings that differ by rounding only, even in the deepest towers
_SIGMOID_SLOPE = 1.702  # of QuickGELU
_SMALLEST = 8  # smallest batch of a compiled tower, and smallest step between batch sizes
_compilations = itertools.count()


def fast_copy(clip: Clip, precision: Precision = "fp32", *, compiled: bool = False, backend: str = "inductor") -> Clip:
    """Return `clip` with a separate image tower for attacks; all else is shared. Gradients reach the pixels only.

    Args:
        compiled: compile the tower with torch.compile at its first use, with CUDA graphs on a GPU.
        backend: of torch.compile.

    Raises:
        UserError: the image tower has custom parts that do not compute in `precision` what they do in fp32.
    """
    copied, model = _shallow(clip), _shallow(clip.model)
    is_stock = class_token_tower(clip.model) is not None and not clip.enters_blocks
    copied.normalizes = type(clip).tower_input is not Clip.tower_input  # else the tower casts in the same pass
    scaling = None if copied.normalizes else (clip.mean, clip.std)
    try:
        tower = _Tower(cast(nn.Module, clip.model.visual), scaling, is_stock, _DTYPES[precision], compiled, backend)
        model.visual, copied.model = tower, model
        fits = not clip.own_forward and (is_stock or _near(clip, tower))
    except (RuntimeError, TypeError, ValueError, AttributeError):  # from hooks that get unexpected tensors
        fits = False
    if not fits:
        raise UserError(
            f"the image tower of '{clip.spec}' has parts of its own (hooks, adapters, patched methods) that do not "
            f"compute in {precision} what they do in fp32: use precision fp32."
        )
    return copied


def refresh(copied: Clip) -> None:
    """Give a copy its model's weights of now, as far as they are trained (`requires_grad`)."""
    cast(_Tower, copied.model.visual).refresh()


def is_fast_copy(clip: Clip) -> bool:
    """Return whether a model computes in the precision of its copied tower, so that autocast would only add casts."""
    return isinstance(clip.model.visual, _Tower)


def stop_compiling(clip: Clip, reason: str) -> bool:
    """Let a compiled copy run without, and drop its graphs; return whether it was compiled.

    CUDA graphs keep the memory of every batch size that they ran. Other copies are compiled again at their next use.
    """
    tower = clip.model.visual
    if not isinstance(tower, _Tower) or not tower.compiled:
        return False
    tower.stop_compiling(reason)
    torch.compiler.reset()
    return True


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
    """Image tower in reduced precision; inputs and outputs stay fp32.

    Args:
        scaling: mean and standard deviation that pixels are normalised with; None if they come normalised.
    """

    def __init__(
        self,
        visual: nn.Module,
        scaling: tuple[Tensor, Tensor] | None,
        is_stock: bool,
        dtype: torch.dtype,
        compiled: bool,
        backend: str,
    ) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual).to(dtype).eval().requires_grad_(False)
        self.dtype, self.compiled, self._scaling = dtype, compiled, scaling
        factors = dict(_replace_quick_gelu(self.visual)) if is_stock and dtype != torch.float32 else {}
        pairs = zip(self.visual.named_parameters(), visual.parameters(), strict=True)
        self._weights = [(target, source, factors.get(name, 1.0)) for (name, target), source in pairs]
        _copy_weights([weight for weight in self._weights if weight[2] != 1])
        embed: Callable[[Tensor], Any] = functools.partial(encode_class_token, self.visual) if is_stock else self.visual
        self._eager = embed
        self._graphs = compiled and backend == "inductor" and next(visual.parameters()).is_cuda
        # torch makes one graph for the first size of a batch and one for all others; CUDA graphs are one per size
        self._embed = _compile(embed, backend, self._graphs) if compiled else embed
        self._last: Callable[[], _Pass | None] = lambda: None

    def refresh(self) -> None:
        _copy_weights([weight for weight in self._weights if weight[1].requires_grad])

    def forward(self, pixels_BCHW: Tensor) -> Any:
        count, one = len(pixels_BCHW), _Pass()
        if self.compiled and padded(count) > count:
            pixels_BCHW = F.pad(pixels_BCHW, (0, 0, 0, 0, 0, 0, 0, padded(count) - count))
        if self._graphs:
            self._mark_step(one)
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            out = self._run(_Enter.apply(pixels_BCHW, self._scaling, self.dtype, one))
            if isinstance(out, tuple):  # CoCa's tower returns its tokens, too
                return _Leave.apply(out[0], one)[:count], *(rest[:count] for rest in out[1:])
            return _Leave.apply(out, one)[:count]

    def _run(self, x_BCHW: Tensor) -> Any:
        """Embed; without compiling where torch.compile fails, as it does on some versions for some towers."""
        try:
            return self._embed(x_BCHW)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # those of compilers have no class in common
            if not self.compiled:
                raise
            self.stop_compiling(f"torch.compile fails ({' '.join(str(error).split())[:200]})")
            return self._embed(x_BCHW)

    def stop_compiling(self, reason: str) -> None:
        self.compiled, self._graphs, self._embed = False, False, self._eager
        warnings.warn(f"attacks run without compiling: {reason}", stacklevel=3)

    def _mark_step(self, one: "_Pass") -> None:
        """Let CUDA graphs use their memory anew, unless a pass still waits for its backward pass."""
        last = self._last()
        if last is None or last.done:
            torch.compiler.cudagraph_mark_step_begin()
            if torch.is_grad_enabled():
                self._last = weakref.ref(one)


def _compile(embed: Callable[[Tensor], Any], backend: str, graphs: bool) -> Callable[[Tensor], Any]:
    def run(x_BCHW: Tensor) -> Any:
        return embed(x_BCHW)

    # torch compiles a code object eight times, for all who use it together, and then runs it as it is without a word
    run.__code__ = run.__code__.replace(co_name=f"embed_{next(_compilations)}")
    if graphs:
        # mode="reduce-overhead" without an analysis that ends in an assertion on ViTs (torch 2.11)
        options: dict[str, Any] = {"triton.cudagraphs": True, "triton.coalesce_tiling_analysis": False}
        with contextlib.suppress(RuntimeError):  # a torch that does not know the option
            return torch.compile(run, options=options)
    return torch.compile(run, backend=backend, mode="reduce-overhead" if graphs else None)


def _replace_quick_gelu(visual: nn.Module) -> Iterator[tuple[str, float]]:
    """Replace QuickGELU, x·sigmoid(1.702·x), by SiLU, which is one kernel; yield the factors by name for the weights
    around it that make up for the difference."""
    from open_clip.transformer import QuickGELU  # the import takes seconds

    for name, mlp in list(visual.named_modules()):
        if isinstance(getattr(mlp, "gelu", None), QuickGELU):
            mlp.gelu = nn.SiLU()
            yield f"{name}.c_fc.weight", _SIGMOID_SLOPE
            yield f"{name}.c_fc.bias", _SIGMOID_SLOPE
            yield f"{name}.c_proj.weight", 1 / _SIGMOID_SLOPE


@torch.no_grad()
def _copy_weights(weights: list[tuple[Tensor, Tensor, float]]) -> None:
    for target, source, factor in weights:
        target.copy_(source if factor == 1 else factor * source)


def padded(count: int) -> int:
    """Return the size to which a batch is padded: decided images leave an attack one by one, and a graph needs few
    sizes.

    There are four sizes between a power of two and the next, so that above the smallest sizes padding adds at most a
    quarter.
    """
    step = max(_SMALLEST, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


class _Pass:
    """One pass through a tower.

    Attributes:
        size_B1: what `_Leave` divided the gradient by.
        done: whether the backward pass is over.
    """

    size_B1: Tensor
    done = False


class _Enter(torch.autograd.Function):
    """Normalise and cast to the tower's precision; the gradient comes back in fp32, multiplied by the size that
    `_Leave` divided it by."""

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, scaling: tuple[Tensor, Tensor] | None, dtype: torch.dtype, one: _Pass
    ) -> Tensor:
        ctx.one, ctx.scaling = one, scaling
        return pixels.to(dtype, copy=True) if scaling is None else _normalize(pixels, *scaling, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        size, ctx.one.done = ctx.one.size_B1.view(-1, 1, 1, 1), True
        return gradient * (size if ctx.scaling is None else size / ctx.scaling[1]), None, None, None


@rng.fused
def _normalize(pixels: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return ((pixels - mean) / std).to(dtype)


class _Leave(torch.autograd.Function):
    """Cast back to fp32, in memory that the tower does not reuse. Backward scales each image's gradient to size 1, as
    half precision would lose the small gradients of images that are far from misclassified."""

    @staticmethod
    def forward(ctx: Any, embedded_BD: Tensor, one: _Pass) -> Tensor:
        ctx.one, ctx.dtype = one, embedded_BD.dtype
        return embedded_BD.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        ctx.one.size_B1 = gradient_BD.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (gradient_BD / ctx.one.size_B1).to(ctx.dtype), None

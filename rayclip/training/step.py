"""One step of training: attack a batch, then differentiate the method's loss on it."""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayclip.methods import Batch, Method
from rayclip.models import Clip
from rayclip.models.clip import frozen
from rayclip.models.fast import fast_copy, refresh, stop_compiling
from rayclip.types import UserError


def attack_and_backward(
    module: nn.Module,
    clip: Clip,
    method: Method,
    batch: Batch,
    parts: int = 1,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    attacked: Clip | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of this worker's batch to the parameters; return the metrics.

    The batch is split into parts, so that the memory is that of one part. A loss that compares samples needs the whole
    batch at once; in that case the encoders work part by part instead, twice.

    The model is in eval mode for the attack and for the loss: BatchNorm keeps the statistics of the loaded model (its
    scale and shift are trained), and dropout is off. A sample's contribution to the gradient then depends on no other
    sample and on no random state, and a batch in parts, or on several workers, gives exactly the result of the whole
    batch. Synchronised statistics would make workers agree with each other, but not parts with the whole batch, nor the
    attack, which takes the statistics as fixed, with the loss.

    Args:
        module: `LossOf` the method, with or without DDP around it.
        parts: number of parts of the batch.
        autocast: makes the context in which attack and loss are computed.
        attacked: the model's copy that the attack runs on (`copy_to_attack`), with its weights of now; None for itself.
    """
    if attacked is not None:
        refresh(attacked)
    attacked = attacked or clip
    module.eval()
    whole = method.compares_samples
    chunk = -(-len(batch.labels_B) // parts) if whole and parts > 1 else 0
    todo = [batch] if whole else batch.split(parts)
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(todo):
        alone = isinstance(module, DistributedDataParallel) and i < len(todo) - 1  # workers sync only at the last part
        chunks = clip.in_chunks(chunk), attacked.in_chunks(chunk)
        with chunks[0], chunks[1], module.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with autocast():
                with frozen(clip):
                    part = _attack(method, attacked, part)
                loss, metrics = module(part)
            loss.backward()
        sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
    return sums


def _attack(method: Method, attacked: Clip, batch: Batch) -> Batch:
    """Attack a batch; without compiling from now on if memory is short, as CUDA graphs keep theirs."""
    try:
        return method.attack(attacked, batch)
    except torch.OutOfMemoryError:
        if not stop_compiling(attacked, "memory is short"):
            raise
    gc.collect()  # outside the except block: its error keeps the pass's tensors alive
    torch.cuda.empty_cache()
    return method.attack(attacked, batch)


def copy_to_attack(clip: Clip, precision: str, *, compiled: bool = False) -> Clip | None:
    """Return a reduced copy of a model for attacks, compiled or not; None for runs in fp32 that are not compiled, and
    for towers that cannot be copied.

    It is in fp16, an eighth of whose rounding errors bf16 has: an attack of few steps in bf16 is weaker by 1 %.
    """
    if precision != "bf16" and not compiled:
        return None
    with contextlib.suppress(UserError):
        return fast_copy(clip, "fp16" if precision == "bf16" else "fp32", compiled=compiled)
    return None


class LossOf(nn.Module):
    """A method's loss as a module, since DDP prepares its gradient reduction in the module's forward."""

    def __init__(self, clip: Clip, method: Method, auxiliary: nn.Module | None = None) -> None:
        super().__init__()
        self.clip, self.method, self.auxiliary = clip, method, auxiliary

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method.loss(self.clip, replace(batch, auxiliary=self.auxiliary))


def autocast_to(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    bf16 = precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()

"""Exact fp32 arithmetic (no TF32), in training and in evaluation alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def use_exact_fp32() -> None:
    """Switch TF32 off in this process, for matrix products and for convolutions.

    With TF32, which torch leaves on for convolutions, a GPU rounds the factors of an fp32 product to 10 bits. All code
    that trains, attacks or evaluates calls this first; since all of it needs the same setting, nothing is restored.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Switch TF32 off in the block, for code that runs in a caller's process."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    try:
        kept = torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32
        newer = None
    except RuntimeError:  # the caller has set torch's newer names, beside which the older ones cannot be read
        newer = matmul.fp32_precision, cudnn.conv.fp32_precision
    use_exact_fp32()
    try:
        yield
    finally:
        if newer is None:
            torch.set_float32_matmul_precision(kept[0])
            matmul.allow_tf32, cudnn.allow_tf32 = kept[1:]
        else:
            matmul.fp32_precision, cudnn.conv.fp32_precision = newer


def widened(x: Tensor) -> Tensor:
    """Return values of reduced precision as fp32, others unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_logits(rows_BD: Tensor, columns_KD: Tensor, scale: Tensor) -> Tensor:
    """Return `scale · <row, column>` of normalised embeddings, `(B, K)`; under autocast in fp32, too, as a logit of 30
    would be off by 0.1 in bf16."""
    with torch.autocast(rows_BD.device.type, enabled=False):
        return scale * widened(rows_BD) @ widened(columns_KD).T


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether the model's output for a sample in train mode depends on the rest of its batch (RN50)."""
    return any(isinstance(module, _BATCH_NORMS) for module in model.modules())

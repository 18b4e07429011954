"""The only name of torch that is not public; without it a tower is compiled twice."""

from importlib import import_module

from torch import Tensor


def mark_batch_dynamic(images_BCHW: Tensor) -> None:
    """Let `torch.compile` make one graph for all batch sizes at once, where it else learns that from a second size."""
    mark = getattr(import_module("torch._dynamo"), "maybe_mark_dynamic", None)
    if mark is not None:
        mark(images_BCHW, 0)

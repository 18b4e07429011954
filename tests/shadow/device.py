"""A device that behaves towards the host as a GPU does, for machines without one: its tensors hold their data on the
CPU, it refuses to mix with tensors of the CPU, and every operation that would make the host wait for a GPU is counted
by the line of the package that asked for it.

Importing it changes this process's PyTorch for good: only processes of their own may (`shadow.run`).
"""

import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "shadow"
# Operations whose result the host must know, or whose result's size depends on values
_READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}

torch._C._set_only_lift_cpu_tensors(True)
torch.__future__.set_overwrite_module_params_on_conversion(True)
torch.autograd.set_multithreading_enabled(False)
_setup_privateuseone_for_python_backend(NAME)
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]


class OnDevice(torch.Tensor):
    """A tensor on the device; `data` is where its values really are."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor) -> "OnDevice":
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, elem.size(), **layout, device=torch.device(NAME, 0))

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Device(TorchDispatchMode):
    """Runs all operations on the device's tensors.

    Attributes:
        waits: how often each line of the package made the host wait: `attacks/fab.py: <the line>`.
        operations: number of operations that are kernels or views of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(operation, args, kwargs or {})

    def run(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = operation.overloadpacket.__name__
        target = kwargs.get("device")
        here = [isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        arrives = target is not None and torch.device(target).type == NAME
        if not any(here) and not arrives:
            return operation(*args, **kwargs)
        self.operations += 1
        leaves = target is not None and torch.device(target).type == "cpu"
        if not all(here):
            self._check_mixture(name, args, kwargs)
        self.waits.update([_line()] * sum(1 for _ in _reasons(name, args, kwargs, arrives and not any(here), leaves)))
        inner_args, inner_kwargs = tree_map(_data, args), tree_map(_data, kwargs)
        if arrives:
            inner_kwargs["device"] = "cpu"
        inner_kwargs.pop("pin_memory", None)
        found = operation(*inner_args, **inner_kwargs)
        if leaves or name == "_local_scalar_dense":
            return found
        if name == "copy_":
            return args[0]
        found = tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)
        return return_and_correct_aliasing(operation, args, kwargs, found)

    @staticmethod
    def _check_mixture(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "copy_" or name == "_to_copy":
            return
        for x in tree_leaves((args, kwargs)):
            if not isinstance(x, Tensor) or isinstance(x, OnDevice) or not x.dim():
                continue
            if not (name in _INDEXING and any(x is i for i in tree_leaves(args[1]))):
                raise RuntimeError(f"{name} mixes a {NAME} tensor with one of the CPU, {tuple(x.shape)} {x.dtype}")


def _data(x: Any) -> Any:
    return x.elem if isinstance(x, OnDevice) else x


def _reasons(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], arrives: bool, leaves: bool) -> Iterator[str]:
    """Yield each reason why the host waits in this operation."""
    waits = not kwargs.get("non_blocking", False)
    if name in _READS or (name == "repeat_interleave" and isinstance(args[0], OnDevice) and len(args) == 1):
        yield "the host reads a value"
    if name == "_to_copy" and (leaves or (arrives and waits)):
        yield "a copy between the host and the device"
    if name == "copy_" and isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice):
        yield "a copy between the host and the device"
    if name == "copy_" and not isinstance(args[1], OnDevice) and args[1].dim() and not any(args[2:]) and waits:
        yield "a copy between the host and the device"
    if name in _INDEXING:
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        number = "put" in name and not args[2].dim()
        masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
        if not (number and len(masks) == 1):  # that is a masked_fill
            yield from ("a mask's size is read" for _ in masks)
        yield from ("a copy between the host and the device" for x in indices if not isinstance(x, OnDevice))


def _line() -> str:
    """Return the line of the package that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/rayclip/" in file:
            return f"{file.rpartition('/rayclip/')[2]}: {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "elsewhere"


DEVICE = Device()

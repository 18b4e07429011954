"""Operations and memory traffic of a random draw and of an attack's step on a GPU, counted without one.

    python tests/benchmarks/kernels.py

Fake tensors on a fake GPU go the way of real ones: each operation that is no view is a kernel, which reads its inputs
and writes its outputs; a chain that is compiled (`rng.fused`) is one kernel. A step's own part is what it adds to the
pass of the model: pixels, normalisation, cast and back, sign, projection.

What decides by values cannot be faked: an iteration of FAB and a step of MMCoA run on the bundled model on the CPU,
where compiled chains count as their parts, with the model's own passes.
"""

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayclip import rng
from rayclip.attacks import Samples, make_attack
from rayclip.attacks.bert import TextSettings
from rayclip.data import batch_pixels, open_data
from rayclip.methods import METHODS
from rayclip.methods.base import Recipe
from rayclip.models import ZeroShot, fast, load_model
from rayclip.models.resizing import resized
from rayclip.rng import sample_keys
from rayclip.training import TrainConfig, train

IMAGES, SIDE = 256, 224
VOLUME = IMAGES * 3 * SIDE**2 * 4  # bytes of a batch in fp32


class Count(TorchDispatchMode):
    """Kernels, and the bytes that they read and write, in volumes of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.silent = 0, 0, False

    def add(self, given: object, found: object) -> None:
        self.kernels += 1
        leaves = [x for x in tree_leaves((given, found)) if isinstance(x, Tensor)]
        self.bytes += sum(x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in leaves)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = operation(*args, **(kwargs or {}))
        name = operation.name()
        is_view = operation.is_view or name.startswith("prim::") or name in ("aten::detach", "aten::_unsafe_view")
        if not (self.silent or is_view):
            self.add((args, kwargs), found)
        return found


counts: list[Count] = []  # the last one counts


def compile_as_one(chain: Callable[..., object], **_: object) -> Callable[..., object]:
    def run(*args: object) -> object:
        counts[-1].silent = True
        found = chain(*args)
        counts[-1].silent = False
        counts[-1].add(args, found)
        return found

    return run


def counted(function: Callable[[], object]) -> tuple[int, float]:
    """Count the second call: the first one makes what is kept."""
    for _ in range(2):
        counts.append(Count())
        with mock.patch("torch.compile", compile_as_one), counts[-1]:
            function()
    return counts[-1].kernels, counts[-1].bytes / VOLUME


def a_step(norm: str, stop: str) -> tuple[int, float]:
    """Of PGD on a tower in bf16 that costs nothing: what a run of three steps has more than one of two."""
    pixels = torch.rand(IMAGES, 3, SIDE, SIDE, device="cuda")
    mean, std = (torch.rand(1, 3, 1, 1, device="cuda") for _ in range(2))
    samples = Samples(
        pixels, torch.zeros(IMAGES, dtype=torch.int64, device="cuda"), torch.arange(IMAGES, device="cuda")
    )

    context, reduced = SimpleNamespace(), torch.rand(IMAGES, 3, SIDE, SIDE, device="cuda", dtype=torch.bfloat16)

    def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(IMAGES, dtype=torch.bool, device="cuda")
        fast._Enter.forward(context, pixels.detach(), (mean, std), torch.bfloat16, one := fast._Pass())
        one.size_B1 = nothing.float()
        return nothing.float(), nothing

    def backward(*_: object) -> tuple[Tensor]:  # autograd itself wants a real GPU
        return fast._Enter.backward(context, reduced)[:1]

    both = []
    for steps in (3, 2):
        attack = make_attack("pgd", steps=steps, step=1 / 255, stop=stop, norm=norm)
        with mock.patch("torch.autograd.grad", backward):
            both.append(counted(lambda attack=attack: attack.ascend(forward, samples, eps=4 / 255)))
    return both[0][0] - both[1][0], both[0][1] - both[1][1]


def an_iteration_of_fab() -> tuple[int, float]:
    """What a run of four iterations has more than one of three, towards one class, on 64 digits; in MB."""
    data = open_data("digits", "test")
    victim = ZeroShot(load_model("digits"), data.class_names)
    images = batch_pixels(data, range(64), "native", 8).float() / 255
    samples = Samples(images, torch.from_numpy(data.labels[:64]), sample_keys(range(64), 0, "x"))
    both = [
        counted(
            lambda n=n: make_attack("fab-t", iterations=n, targets=1, stop="final").run(victim, samples, eps=24 / 255)
        )
        for n in (4, 3)
    ]
    return both[0][0] - both[1][0], (both[0][1] - both[1][1]) * VOLUME / 1e6


def a_step_of_mmcoa() -> tuple[int, float]:
    """What a run of three epochs of one step has more than one of two: 50 digits, 10 PGD steps, text attack; in MB."""
    text = TextSettings(substitutes="clip-table")
    method = METHODS.find("mmcoa")(eps=16 / 255, steps=10, step=4 / 255, text=text)
    both = []
    for epochs in (3, 2):
        recipe = Recipe(optimizer="adamw", lr=1e-3, batch_size=50, epochs=epochs)
        config = TrainConfig(model="digits", data="digits", method=method, recipe=recipe, shots=5, precision="fp32")
        counts.append(Count())
        with counts[-1]:
            train(config, Host())
        both.append((counts[-1].kernels, counts[-1].bytes / 1e6))
    return both[0][0] - both[1][0], both[0][1] - both[1][1]


class Host:
    """What `training.train` needs of its surroundings."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[None]:
        yield None

    def report(self, progress: object, save: object) -> None:
        pass


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.filterwarnings("ignore", message=".*CUDA is not available")
    with FakeTensorMode(allow_non_fake_inputs=True):
        keys = torch.arange(IMAGES, device="cuda")
        small = torch.rand(IMAGES, 3, 32, 32, device="cuda")
        rows = {
            "a draw": counted(lambda: rng.uniform(keys, (3, SIDE, SIDE))),
            "a step in l_inf": a_step("linf", "final"),
            "a step in l_2": a_step("l2", "final"),
            "resize 32 to 224": counted(lambda: resized(small, SIDE, "antialias")),
        }
    for name, (kernels, volumes) in rows.items():
        print(f"{name:20} {kernels:4d} kernels {volumes:7.1f} volumes of {VOLUME / 1e6:.0f} MB")
    for name, (kernels, megabytes) in {
        "an iteration of FAB": an_iteration_of_fab(),
        "a step of MMCoA": a_step_of_mmcoa(),
    }.items():
        print(f"{name:20} {kernels:4d} operators {megabytes:7.1f} MB")


if __name__ == "__main__":
    main()

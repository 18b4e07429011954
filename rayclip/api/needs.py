"""Needs of a study besides measured time: operations, the hours that they take on graphics cards, disk, memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from rayclip.distributed.trials import Trial
from rayclip.evaluation import Cell
from rayclip.evaluation.examples import EMBEDDED, EXAMPLES
from rayclip.evaluation.saving import can_save
from rayclip.models import Clip

FIRST_IMAGES = 500  # of each data set, for a first milestone
_ROW, _FILE = 80, 10_000  # bytes of a verdict, and of a file besides its verdicts
_CHECKPOINT_FILES = 4


class Card(NamedTuple):
    """A graphics card with its maker's peak rates of matrix products, in 10¹² operations per second: in bf16 without
    sparsity, and in fp32 without TF32."""

    name: str
    bf16: float
    fp32: float

    def hours(self, training: float, testing: float) -> float:
        """Return the hours that operations take if training is in bf16 and tests are in fp32."""
        return (training / (SHARE_BF16 * self.bf16) + testing / (SHARE_FP32 * self.fp32)) / 1e12 / 3600


CARDS = (
    Card("A100", bf16=312.0, fp32=19.5),
    Card("H100", bf16=989.0, fp32=67.0),
    Card("RTX 4090", bf16=165.0, fp32=82.6),
)
# Shares of these rates that an H100 reached with ViT-B/32 and batches of 256 (tests/benchmarks/README.md): in a step of
# TeCoA in bf16, and in PGD in fp32
SHARE_BF16, SHARE_FP32 = 0.19, 0.58


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Operations, disk, files and memory that what is left to do takes.

    Attributes:
        training, testing: floating-point operations.
        disk: bytes of results and checkpoints.
        files: number of these.
        memory: most bytes that a worker of this machine held while it was measured.
    """

    training: float = 0.0
    testing: float = 0.0
    disk: float = 0.0
    files: int = 0
    memory: float = 0.0

    def __add__(self, other: "Needs") -> "Needs":
        """Return what two studies need, one after the other."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Needs(**{**sums, "memory": max(self.memory, other.memory)})


def needs_of_tests(cells: Sequence[Cell], counts: Mapping[str, int], clip: Clip, largest_shard: int) -> Needs:
    """Return what the cells of one model need.

    Args:
        counts: images of each cell, by its id.
        clip: the model, or another one of its architecture.
        largest_shard: images whose verdicts are one file.
    """
    side = clip.image_size
    pixels = torch.zeros(1, 3, side, side, device=clip.device, requires_grad=True)
    with FlopCounterMode(display=False) as step:  # as one of an attack: `Cell.cost` counts both passes
        embedding = clip.encode_image(pixels)
        torch.autograd.grad(embedding.sum(), pixels)
    width, each = embedding.shape[1], step.get_total_flops() / 2
    pictures = 3 * EXAMPLES * 3 * side * side + 4 * EMBEDDED * width  # before, after and difference; embeddings
    found = Needs()
    for cell in cells:
        images, changes = counts[cell.id], can_save(cell)
        files = 1 + -(-images // largest_shard) + 3 * changes
        found += Needs(
            testing=images * cell.cost * each,
            disk=images * _ROW + files * _FILE + pictures * changes,
            files=files,
        )
    return found


def needs_of_checkpoints(trial: Trial, clip: Clip) -> Needs:
    """Return the room that a training's checkpoints take; `clip` is the model that it starts from."""
    kept = max(1, len(trial.keep_epochs))
    whole = 0 if trial.config.method.learns_prompt else sum(p.numel() * 4 for p in clip.parameters())
    return Needs(disk=kept * (whole + _FILE), files=kept * _CHECKPOINT_FILES)

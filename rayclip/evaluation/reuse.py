"""Adversarial examples that several cells judge: attacks that ignore the defence make the same ones for every defence.

Shapes: B batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from rayclip.attacks import Adversarial, Samples
from rayclip.attacks.geometry import per_image
from rayclip.evaluation.cell import Cell

_BYTES = 256 << 20  # of images that are kept


class Made(NamedTuple):
    """Examples of a batch, and for which of its samples they were made."""

    found: Adversarial
    done_B: Tensor


class Reuse:
    """Examples by what they depend on, the most recently used ones."""

    def __init__(self) -> None:
        self._kept = OrderedDict[Hashable, Made]()
        self._bytes = 0

    def clear(self) -> None:
        """Forget all examples."""
        self._kept.clear()
        self._bytes = 0

    def run(self, key: Hashable, samples: Samples, attack: Callable[[Samples], Adversarial]) -> Adversarial:
        """Return the examples of the samples to attack; `attack` makes those that are not known."""
        todo_B = samples.todo_B
        assert todo_B is not None
        before = self._kept.pop(key, None)
        if before is None:
            made = Made(attack(samples), todo_B)
        else:
            self._bytes -= before.found.images_BCHW.nbytes
            left_B = todo_B & ~before.done_B
            made = before
            if left_B.any():
                new = attack(samples._replace(todo_B=left_B))
                made = Made(_either(left_B, new, before.found), before.done_B | todo_B)
        self._kept[key] = made
        self._bytes += made.found.images_BCHW.nbytes
        while self._bytes > _BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.found.images_BCHW.nbytes
        return _either(todo_B, made.found, Adversarial.untouched(samples.images_BCHW))


def reuse_key(cell: Cell, positions: Hashable) -> Hashable | None:
    """Return what the examples of a cell depend on besides the judge; None if no other cell has the same."""
    if not cell.defense or cell.aim.is_adaptive or cell.attack.changes_texts or not cell.attack.needs_eps:
        return None
    attacked = cell.attacked.describe(), cell.class_names, str(cell.aim.describe())
    return cell.model_fingerprint, cell.data_fingerprint, cell.attack, cell.protocol, attacked, positions


def _either(first_B: Tensor, first: Adversarial, second: Adversarial) -> Adversarial:
    """Return the examples of `first` for some samples, and those of `second` for the others."""
    part_B = None
    if first.part_B is not None:
        part_B = torch.where(first_B, first.part_B, 0 if second.part_B is None else second.part_B)
    return Adversarial(
        torch.where(per_image(first_B), first.images_BCHW, second.images_BCHW),
        None,
        torch.where(first_B, first.steps_B, second.steps_B),
        torch.where(first_B, first.queries_B, second.queries_B),
        part_B,
    )

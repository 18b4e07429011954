"""Hold a part of a run's training data out, to validate on."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayclip.attacks import Attack, parse_attacks
from rayclip.data import ImageSet, few_shot
from rayclip.types import UserError
from rayclip.units import parse_budget

_SHARE, _MOST = 0.1, 1000  # held out by default: this share of the images, at most so many
_STREAM = 2**32  # beside the random numbers of few-shot draws, whose streams are the classes
_EXAMPLE = "every=1,size=0.1,attacks=pgd:steps=20,eps=1/255"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How a run is validated.

    The held-out images are drawn with the run's seed, as many of each class as possible, at most half of a class, and
    never trained on. Of a few-shot run they are drawn from the images that it does not train on, which are the same
    with and without validation.

    The best epoch has the highest accuracy under the first attack (without attacks: the highest clean accuracy); of
    equal ones the highest clean accuracy, then the earliest. Its weights are in the folder `best` of the checkpoint.

    Attributes:
        every: epochs between two validations; the last epoch is always validated.
        size: number of held-out images, or below 1 their share of all; None is a tenth, at most 1,000.
        attacks: attacks on images, each with its budget.
    """

    every: int = 1
    size: float | None = None
    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        if self.size is not None and not (0 < self.size < 1 or (self.size >= 1 and self.size == int(self.size))):
            raise UserError(f"validate: size={self.size:g} is neither a share below 1 nor a number of images.")
        for attack in self.attacks:
            if attack.changes_texts or attack.gives_own_texts:
                raise UserError(f"validate: {attack.name} changes texts; name attacks on images, such as pgd.")
        names = [attack.label_with_budget for attack in self.attacks]
        if len(set(names)) < len(names):
            raise UserError(
                "validate: two of the attacks have the same name and steps, as their curves would: drop one."
            )

    @classmethod
    def parse(cls, text: str, eps: float) -> "HeldOut":
        """Parse `every=1,size=0.1,attacks=pgd:steps=20,eps=1/255`; what is left out has its default.

        Args:
            eps: budget of the attacks that have none, in pixel units.

        Raises:
            UserError: unknown setting or attack, or a value that does not parse.
        """
        values: dict[str, str] = {}
        last = ""
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if key in ("every", "size", "attacks", "eps") and equals and key not in values:
                last, values[key] = key, value
            elif last == "attacks":  # which hold commas themselves
                values[last] += f",{part}"
            else:
                raise UserError(f"--validate '{text}': '{part}' is none of its settings: write {_EXAMPLE}.")
        try:
            every, size = int(values.get("every", "1")), float(values["size"]) if "size" in values else None
        except ValueError:
            every, size = 0, None
        if every < 1:
            raise UserError(f"--validate '{text}': every and size are numbers from 1 and above 0: write {_EXAMPLE}.")
        budget = parse_budget(values["eps"]) if "eps" in values else eps
        found = [attack for attack in parse_attacks(values.get("attacks", "pgd"), {}) if attack.name != "clean"]
        return cls(every=every, size=size, attacks=tuple(attack.within(budget) for attack in found))

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        attacks = [a.label_with_budget + "".join(f" {k}={v}" for k, v in a.describe().items()) for a in self.attacks]
        return {"every": self.every, "size": self.size, "attacks": "; ".join(attacks)}

    def count(self, images: int) -> int:
        """Return the number of images to hold out of so many."""
        if self.size is None:
            return min(_MOST, math.ceil(_SHARE * images))
        return int(self.size) if self.size >= 1 else math.ceil(self.size * images)


def split(whole: ImageSet, shots: int | None, seed: int, held_out: HeldOut | None) -> tuple[ImageSet, ImageSet | None]:
    """Return the images to train on, and those to validate on (`HeldOut`). Raise a `UserError` if there are none, or
    fewer images of a class than shots."""
    drawn = few_shot(whole, shots, seed)
    if held_out is None:
        return drawn, None
    free = np.ones(len(whole), dtype=bool) if drawn is whole else ~np.isin(whole.ids, drawn.ids)
    ranked: list[tuple[int, int, int]] = []  # rank in its class, label, position
    for label in range(len(whole.class_names)):
        members = np.flatnonzero(free & (whole.labels == label))
        most = len(members) // 2 if drawn is whole else len(members)
        order = np.random.Generator(np.random.Philox(key=[seed, _STREAM + label])).permutation(members)
        ranked += [(rank, label, int(position)) for rank, position in enumerate(order[:most])]
    chosen = np.sort([position for *_, position in sorted(ranked)[: held_out.count(len(whole))]]).astype(np.int64)
    if not len(chosen):
        raise UserError(f"no class of '{whole.name}' has images to hold out: leave --validate away.")
    rest = drawn if drawn is not whole else whole.subset(np.setdiff1d(np.arange(len(whole)), chosen))
    return rest, whole.subset(chosen)

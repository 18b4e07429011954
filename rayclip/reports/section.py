"""Comparable numbers: which models were judged on which data under which attacks, and how accurate they were.

Sections come from result files (`numbers.sections`) or from the rows of a command (`rows.row_sections`). This module
imports neither torch nor numpy, so that a command whose answer is known prints it at once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rayclip.reports.model import Model
from rayclip.types import Cut

if TYPE_CHECKING:
    from rayclip.reports.results import JudgedCell
    from rayclip.reports.verdicts import Paired, Verdicts

AVERAGE = "average"
# Settings that all numbers of a section share; the others belong to one attack and are listed below the tables
SHARED = ("resolution", "resize", "class_names", "template", "seed", "protocol")
Kind = Literal["clean", "image", "text", "multimodal", "worst"]
_KINDS: tuple[Kind, ...] = ("clean", "image", "text", "multimodal", "worst")


@dataclass(frozen=True, kw_only=True)
class Number:
    """An accuracy or a recall over `n` samples with its 95 % interval, in percent."""

    top1: float
    low: float
    high: float
    n: int


def average(numbers: Sequence[Number]) -> Number:
    """Return the average as in the papers: every data set has the same weight.

    The interval adds the squared distances to the Wilson limits (MOVER: Zou & Donner, Statistics in Medicine 2008).
    """
    mean = sum(x.top1 for x in numbers) / len(numbers)
    below = math.sqrt(sum((x.top1 - x.low) ** 2 for x in numbers)) / len(numbers)
    above = math.sqrt(sum((x.high - x.top1) ** 2 for x in numbers)) / len(numbers)
    return Number(top1=mean, low=mean - below, high=mean + above, n=sum(x.n for x in numbers))


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The subject of a table row: a model with its scorer and its defence. Unique within a section."""

    model: Model
    scorer: str
    defense: str
    name: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model.fingerprint, self.scorer, self.defense

    @property
    def is_untouched(self) -> bool:
        """Return whether this is a model that nobody fine-tuned or mixed from others here, without a defence."""
        return self.model.method is None and not self.model.is_mix and self.defense == "none"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A table column: an attack with its settings, or the worst case over the attacks of one budget.

    Attributes:
        label: as in metric names, `pgd-10_eps32`.
        settings: those of one cell; settings that are not in the label may differ between data sets. Of a worst case,
            `of` lists the labels of its attacks.
    """

    label: str
    kind: Kind
    settings: Mapping[str, Any] = field(hash=False, compare=False)

    @property
    def eps(self) -> str | None:
        """The budget as text: `1/255`."""
        return self.settings.get("eps")

    @property
    def norm(self) -> str:
        return self.settings.get("norm", "linf")

    @property
    def budget(self) -> float:
        numerator, _, denominator = (self.eps or "0").partition("/")
        return float(numerator) / float(denominator or 1)

    @property
    def label_without_aim(self) -> str:
        """The label without the aim, which only attacks on defended models have."""
        aim = self.settings.get("aim", "ignore")
        return self.label if aim == "ignore" else self.label.replace(f"_{aim}", "")

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key of a column: kind, budget and name."""
        return _KINDS.index(self.kind), self.budget, natural(self.label)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A number with what is behind it.

    Attributes:
        protocol: the settings of the attack; empty for a worst case.
        cut: texts that were truncated.
        verdicts, cells: per sample, and the cells that they come from; of a command's rows, neither.
        partial: whether this is a worst case over fewer attacks than others of its column.
    """

    number: Number
    protocol: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)
    verdicts: "Verdicts | None" = None
    cells: "tuple[JudgedCell, ...]" = ()
    partial: bool = False


@dataclass(kw_only=True)
class Section:
    """Numbers that can be compared in one table: the settings common to all attacks are equal."""

    shared: Mapping[str, Any]
    subjects: list[Subject]
    datasets: list[str]
    attacks: list[Attack]
    entries: dict[tuple[Subject, str, str], Entry]

    def get(self, subject: Subject, dataset: str, attack: Attack) -> Entry | None:
        return self.entries.get((subject, dataset, attack.label))

    def behind(self, subject: Subject, dataset: str, attack: Attack) -> dict[str, Entry]:
        """Return the entries behind a number by data set; `dataset` may be `AVERAGE`."""
        names = self.datasets if dataset == AVERAGE else [dataset]
        return {name: entry for name in names if (entry := self.get(subject, name, attack)) is not None}

    def number(self, subject: Subject, dataset: str, attack: Attack) -> Number | None:
        """Return a number, or None; `dataset` may be `AVERAGE`, which exists only if no data set is missing."""
        found = [entry.number for entry in self.behind(subject, dataset, attack).values()]
        if dataset != AVERAGE:
            return found[0] if found else None
        return average(found) if found and len(found) == len(self.datasets) else None

    def partial(self, subject: Subject, dataset: str, attack: Attack) -> bool:
        """Return whether a number is a worst case over fewer attacks than others of its column, or averages such."""
        return any(entry.partial for entry in self.behind(subject, dataset, attack).values())

    def ranked(self, dataset: str, attack: Attack) -> dict[Subject, Number]:
        """Return the numbers of a column to rank models by.

        Partial ones only if there are no others: a worst case over fewer attacks looks too good.
        """
        found = {s: number for s in self.subjects if (number := self.number(s, dataset, attack)) is not None}
        whole = {s: number for s, number in found.items() if not self.partial(s, dataset, attack)}
        return whole or found

    @property
    def columns(self) -> list[str]:
        """Data sets, and their average if there are several."""
        return [*self.datasets, *([AVERAGE] if len(self.datasets) > 1 else [])]

    @property
    def clean(self) -> Attack | None:
        return next((a for a in self.attacks if a.kind == "clean"), None)

    @property
    def main(self) -> Attack:
        """Attack that models are ranked by: the worst case within the largest l_inf budget, else the last attack."""
        return next((a for a in reversed(self.attacks) if a.kind == "worst" and a.norm == "linf"), self.attacks[-1])

    @property
    def overall(self) -> str:
        """Data that models are ranked on: the average, or the only data set."""
        return self.columns[-1]

    def best(self) -> Subject | None:
        """Return the subject with the highest accuracy under `main` (ties: the first), or None if none has one."""
        found = self.ranked(self.overall, self.main)
        return max(found, key=lambda s: found[s].top1, default=None)

    def compare(self, subject: Subject, other: Subject, dataset: str, attack: Attack) -> "Paired | None":
        """Compare two models on the samples that both have; None if there are none."""
        from rayclip.reports.verdicts import paired

        one, two = self.get(subject, dataset, attack), self.get(other, dataset, attack)
        if one is None or two is None or one.verdicts is None or two.verdicts is None:
            return None
        return paired(one.verdicts, two.verdicts)


def kind_of(protocol: Mapping[str, Any]) -> Kind:
    """Return whether an attack changes nothing, images, texts or both."""
    if protocol["attack"] == "clean":
        return "clean"
    if "eps" not in protocol:
        return "text"
    return "multimodal" if "substitutes" in protocol else "image"


def natural(text: str) -> list[Any]:
    """Return a natural sort key: `5-shot` sorts before `50-shot`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]

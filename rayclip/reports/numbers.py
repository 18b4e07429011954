"""Compute the numbers of tables from verdicts: accuracies, averages, worst cases, and tests of two models.

Shapes: N samples.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import binom

from rayclip.evaluation.aggregate import Ball, WorstCase, ball_of, distinct_labels, wilson, worst_cases
from rayclip.reports.results import JudgedCell, JudgedPairs, Model, Results, Verdicts, natural, shared
from rayclip.types import WORST

AVERAGE = "average"
Kind = Literal["clean", "image", "text", "multimodal", "worst"]
_KINDS: tuple[Kind, ...] = ("clean", "image", "text", "multimodal", "worst")
# Settings that all numbers of a section share; the others belong to one attack and are listed below the tables
_SHARED = ("resolution", "resize", "class_names", "template", "seed", "protocol")


@dataclass(frozen=True, kw_only=True)
class Number:
    """An accuracy over `n` samples with its 95 % interval, in percent."""

    top1: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: int, n: int) -> "Number":
        low, high = wilson(right, n)
        top1 = 100 * right / n
        return cls(top1=top1, low=min(low, top1), high=max(high, top1), n=n)  # rounding, at 0 and 100 %


def average(numbers: Sequence[Number]) -> Number:
    """Return the average as in the papers: every data set has the same weight.

    The interval adds the squared distances to the Wilson limits (MOVER: Zou & Donner, Statistics in Medicine 2008).
    """
    mean = sum(x.top1 for x in numbers) / len(numbers)
    below = math.sqrt(sum((x.top1 - x.low) ** 2 for x in numbers)) / len(numbers)
    above = math.sqrt(sum((x.high - x.top1) ** 2 for x in numbers)) / len(numbers)
    return Number(top1=mean, low=mean - below, high=mean + above, n=sum(x.n for x in numbers))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A paired comparison of two models on the same samples: numbers of samples that only one of them gets right."""

    first: int
    second: int
    n: int

    @property
    def difference(self) -> float:
        """Accuracy of the first minus the second, in percentage points."""
        return 100 * (self.first - self.second) / self.n

    @property
    def p(self) -> float:
        """Exact two-sided p value of McNemar's test (1947): the binomial test of the discordant pairs."""
        discordant = self.first + self.second
        return min(1.0, 2 * float(binom.cdf(min(self.first, self.second), discordant, 0.5))) if discordant else 1.0


def paired(first: Verdicts, second: Verdicts) -> Paired | None:
    """Compare two models' verdicts on the samples that both have; None if they have none in common."""
    if first.positions_N is second.positions_N:
        ones, twos = first.packed & ~second.packed, second.packed & ~first.packed
        return Paired(first=int(np.bitwise_count(ones).sum()), second=int(np.bitwise_count(twos).sum()), n=first.n)
    positions, (a_N, b_N) = shared([first, second])
    if not len(positions):
        return None
    return Paired(first=int((a_N & ~b_N).sum()), second=int((b_N & ~a_N).sum()), n=len(positions))


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

    def described(self) -> dict[str, Any]:
        """Return the columns that describe the subject in a line of CSV."""
        model = self.model
        shots = "full" if model.shots is None else str(model.shots)
        return {
            "model": self.name,
            "spec": model.spec,
            "fingerprint": model.fingerprint,
            "method": model.method or "",
            "trained_on": model.trained_on or "",
            "shots": "" if model.method is None else shots,
            "scorer": self.scorer,
            "defense": self.defense,
        }


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A table column: an attack with its settings, or the worst case over the attacks of one budget.

    Attributes:
        label: as in metric names, `pgd-10_eps32`.
        settings: those of one cell; settings that are not in the label may differ between data sets.
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
    def ball(self) -> Ball | None:
        """Norm and budget; None for an attack without a budget."""
        return ball_of(self.settings)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A number with the verdicts behind it and the cells that they come from.

    `partial`: it is a worst case over fewer attacks than others of its column.
    """

    number: Number
    verdicts: Verdicts
    cells: tuple[JudgedCell, ...]
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

    def number(self, subject: Subject, dataset: str, attack: Attack) -> Number | None:
        """Return a number, or None; `dataset` may be `AVERAGE`, which exists only if no data set is missing."""
        if dataset != AVERAGE:
            entry = self.get(subject, dataset, attack)
            return None if entry is None else entry.number
        found = [entry.number for d in self.datasets if (entry := self.get(subject, d, attack)) is not None]
        return average(found) if found and len(found) == len(self.datasets) else None

    def partial(self, subject: Subject, dataset: str, attack: Attack) -> bool:
        """Return whether a number is a worst case over fewer attacks than others of its column, or averages such."""
        found = [self.get(subject, d, attack) for d in (self.datasets if dataset == AVERAGE else [dataset])]
        return any(entry is not None and entry.partial for entry in found)

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

    def compare(self, subject: Subject, other: Subject, dataset: str, attack: Attack) -> Paired | None:
        one, two = self.get(subject, dataset, attack), self.get(other, dataset, attack)
        return None if one is None or two is None else paired(one.verdicts, two.verdicts)


def kind_of(protocol: Mapping[str, Any]) -> Kind:
    """Return whether an attack changes nothing, images, texts or both."""
    if protocol["attack"] == "clean":
        return "clean"
    changes_text = "substitutes" in protocol
    if "eps" in protocol:
        return "multimodal" if changes_text else "image"
    return "text" if changes_text else "image"


def sections(results: Results) -> list[Section]:
    """Split results into sections of comparable numbers, largest first."""
    groups: dict[str, list[JudgedCell]] = {}
    for cell in results.cells:
        groups.setdefault(json.dumps({k: cell.protocol.get(k) for k in _SHARED}), []).append(cell)
    names = results.names
    found = [_section(json.loads(key), cells, names, results.order) for key, cells in groups.items()]
    return sorted(found, key=lambda s: -len(s.entries))


def _section(
    common: Mapping[str, Any], cells: Sequence[JudgedCell], names: Mapping[str, str], order: Sequence[str]
) -> Section:
    datasets = dataset_names(cells)
    labels = _attack_labels(cells)
    subjects: dict[tuple[str, str, str], Subject] = {}
    attacks: dict[str, Attack] = {}
    entries: dict[tuple[Subject, str, str], Entry] = {}
    for cell in cells:
        subject = _subject(cell, names)
        subject = subjects.setdefault(subject.key, subject)
        label = labels[cell.id]
        attacks.setdefault(label, Attack(label=label, kind=kind_of(cell.protocol), settings=cell.protocol))
        number = Number.of(cell.verdicts.count, cell.verdicts.n)
        entries[subject, datasets[cell.data_fingerprint], label] = Entry(
            number=number, verdicts=cell.verdicts, cells=(cell,)
        )
    rank = {name: i for i, name in enumerate(order)}
    section = Section(
        shared=common,
        subjects=sorted(subjects.values(), key=lambda s: subject_order(s, rank)),
        datasets=sorted(dict.fromkeys(datasets.values()), key=natural),
        attacks=sorted(attacks.values(), key=attack_order),
        entries=entries,
    )
    _add_worst(section)
    return section


def _subject(cell: JudgedCell, names: Mapping[str, str]) -> Subject:
    name = names[cell.model.fingerprint]
    if cell.scorer != "template":
        name = f"{name}, {cell.scorer}"
    if cell.defense != "none":
        name = f"{name} + {cell.defense}"
    return Subject(model=cell.model, scorer=cell.scorer, defense=cell.defense, name=name)


def subject_order(subject: Subject, rank: Mapping[str, int]) -> tuple[Any, ...]:
    """Return the sort key of a row: the order of printed tables first, then training, method, shots and name."""
    model = subject.model
    shots = model.shots if model.shots is not None else math.inf
    own = (model.method is not None, model.method or "", shots, natural(subject.name))
    return rank.get(model.spec, len(rank)), *own


def dataset_names(cells: Iterable[JudgedCell | JudgedPairs]) -> dict[str, str]:
    """Return a name per data fingerprint; data sets of the same name get a part of the fingerprint."""
    names = {cell.data_fingerprint: cell.dataset for cell in cells}
    taken = list(names.values())
    return {f: f"{name} ({f[:6]})" if taken.count(name) > 1 else name for f, name in names.items()}


def _attack_labels(cells: Sequence[JudgedCell]) -> dict[str, str]:
    """Return the column label per cell id (`aggregate.distinct_labels`)."""
    asked = [((c.model.fingerprint, c.scorer, c.defense, c.data_fingerprint), c.attack, c.protocol) for c in cells]
    return {c.id: label for c, label in zip(cells, distinct_labels(asked), strict=True)}


def attack_order(attack: Attack) -> tuple[Any, ...]:
    """Return the sort key of a column: kind, budget and name."""
    return _KINDS.index(attack.kind), _budget(attack), natural(attack.label)


def _budget(attack: Attack) -> float:
    numerator, _, denominator = (attack.eps or "0").partition("/")
    return float(numerator) / float(denominator or 1)


def _add_worst(section: Section) -> None:
    """Add the worst case within each ball (`aggregate.worst_cases`)."""
    added = []
    for case in worst_cases([a.settings for a in section.attacks]):
        within = [section.attacks[i] for i in case.of([a.settings for a in section.attacks])]
        settings = {"attack": WORST, "of": [a.label for a in within], **case.described()}
        worst = Attack(label=case.label, kind="worst", settings=settings)
        before = len(section.entries)
        for subject in section.subjects:
            for dataset in section.datasets:
                _add_worst_of(section, subject, dataset, within, worst, case)
        if len(section.entries) > before:
            added.append(worst)
    section.attacks += added


def _add_worst_of(
    section: Section, subject: Subject, dataset: str, within: Sequence[Attack], worst: Attack, case: WorstCase
) -> None:
    run = [a.settings for a in within if section.get(subject, dataset, a) is not None]
    entry = worst_over(section, subject, dataset, within) if case.of(run) else None
    if entry is not None:
        section.entries[subject, dataset, worst.label] = entry


def worst_over(section: Section, subject: Subject, dataset: str, attacks: Sequence[Attack]) -> Entry | None:
    """Return the worst case over those of `attacks` that were run, on the samples that all of these have, or None."""
    found = {a: entry for a in attacks if (entry := section.get(subject, dataset, a)) is not None}
    if not found:
        return None
    positions, rights = shared([entry.verdicts for entry in found.values()])
    if not len(positions):
        return None
    verdicts = Verdicts.of(positions, np.logical_and.reduce(rights))
    wanted = {_aimless(a) for a in attacks if a.kind != "clean"}
    return Entry(
        number=Number.of(verdicts.count, verdicts.n),
        verdicts=verdicts,
        cells=tuple(cell for entry in found.values() for cell in entry.cells),
        partial=not wanted <= {_aimless(a) for a in found},
    )


def _aimless(attack: Attack) -> str:
    """Return an attack's label without the aim, which only attacks on defended models have."""
    aim = attack.settings.get("aim", "ignore")
    return attack.label if aim == "ignore" else attack.label.replace(f"_{aim}", "")

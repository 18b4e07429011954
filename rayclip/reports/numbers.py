"""From result files to sections: accuracies with intervals, and the worst case over attacks, per sample."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rayclip.evaluation.aggregate import distinct_labels, wilson, worst_cases
from rayclip.reports.results import Judged, JudgedCell, Results
from rayclip.reports.section import SHARED, Attack, Entry, Number, Section, Subject, kind_of, natural
from rayclip.reports.verdicts import Verdicts, align
from rayclip.types import WORST, Cut, full_name


def number_of(right: int, n: int) -> Number:
    """Return the share of `n` samples that are right, with its Wilson interval."""
    low, high = wilson(right, n)
    top1 = 100 * right / n
    return Number(top1=top1, low=min(low, top1), high=max(high, top1), n=n)  # rounding, at 0 and 100 %


def sections(results: Results) -> list[Section]:
    """Split results into sections of comparable numbers, largest first."""
    groups: dict[str, list[JudgedCell]] = {}
    for cell in results.cells:
        groups.setdefault(json.dumps({k: cell.protocol.get(k) for k in SHARED}), []).append(cell)
    names = results.names
    found = [make_section(json.loads(key), cells, names, results.order) for key, cells in groups.items()]
    return sorted(found, key=lambda s: -len(s.entries))


def make_section(
    common: Mapping[str, Any], cells: Sequence[JudgedCell], names: Mapping[str, str], order: Sequence[str]
) -> Section:
    """Return the numbers of cells that can be compared.

    Args:
        common: the settings that they share.
        names: of models, by fingerprint.
        order: of printed tables.
    """
    datasets = dataset_names(cells)
    asked = [((c.model.fingerprint, c.scorer, c.defense, c.data_fingerprint), c.attack, c.protocol) for c in cells]
    subjects: dict[tuple[str, str, str], Subject] = {}
    attacks: dict[str, Attack] = {}
    entries: dict[tuple[Subject, str, str], Entry] = {}
    for cell, label in zip(cells, distinct_labels(asked), strict=True):
        name = full_name(names[cell.model.fingerprint], cell.scorer, cell.defense)
        subject = Subject(model=cell.model, scorer=cell.scorer, defense=cell.defense, name=name)
        subject = subjects.setdefault(subject.key, subject)
        attacks.setdefault(label, Attack(label=label, kind=kind_of(cell.protocol), settings=cell.protocol))
        entries[subject, datasets[cell.data_fingerprint], label] = Entry(
            number=number_of(cell.verdicts.count, cell.verdicts.n),
            protocol=cell.protocol,
            cut=cell.cut,
            verdicts=cell.verdicts,
            cells=(cell,),
        )
    section = Section(
        shared=common,
        subjects=sort_subjects(subjects.values(), order),
        datasets=sorted(dict.fromkeys(datasets.values()), key=natural),
        attacks=sorted(attacks.values(), key=lambda attack: attack.order),
        entries=entries,
    )
    _add_worst_cases(section)
    return section


def sort_subjects(subjects: Iterable[Subject], printed: Sequence[str]) -> list[Subject]:
    """Sort rows: the order of printed tables first, then training, method, shots and name."""
    rank = {name: i for i, name in enumerate(printed)}

    def key(subject: Subject) -> tuple[Any, ...]:
        model = subject.model
        shots = math.inf if model.shots is None else model.shots
        own = (model.method is not None, model.method or "", shots, natural(subject.name))
        return rank.get(model.spec, len(rank)), *own

    return sorted(subjects, key=key)


def dataset_names(cells: Iterable[Judged]) -> dict[str, str]:
    """Return a name per data fingerprint; data sets of the same name get a part of the fingerprint."""
    names = {cell.data_fingerprint: cell.dataset for cell in cells}
    taken = list(names.values())
    return {f: f"{name} ({f[:6]})" if taken.count(name) > 1 else name for f, name in names.items()}


def _add_worst_cases(section: Section) -> None:
    """Add the worst case within each ball (`aggregate.worst_cases`) wherever several attacks were run."""
    plain = list(section.attacks)
    protocols = [a.settings for a in plain]
    for case in worst_cases(protocols):
        within = [plain[i] for i in case.of(protocols)]
        settings = {"attack": WORST, "of": [a.label for a in within], **case.described()}
        worst = Attack(label=case.label, kind="worst", settings=settings)
        found = {}
        for subject, dataset in itertools.product(section.subjects, section.datasets):
            run = [a.settings for a in within if section.get(subject, dataset, a) is not None]
            entry = worst_over(section, subject, dataset, within) if case.of(run) else None
            if entry is not None:
                found[subject, dataset, worst.label] = entry
        section.entries |= found
        section.attacks += [worst] * bool(found)


def worst_over(section: Section, subject: Subject, dataset: str, attacks: Sequence[Attack]) -> Entry | None:
    """Return the worst case over those of `attacks` that were run, on the samples that all of these have, or None."""
    found = {a: entry for a in attacks if (entry := section.get(subject, dataset, a)) is not None}
    if not found:
        return None
    positions, rights = align([entry.verdicts for entry in found.values() if entry.verdicts is not None])
    if not len(positions):
        return None
    verdicts = Verdicts(positions_N=positions, right_N=np.logical_and.reduce(rights))
    wanted = {a.label_without_aim for a in attacks if a.kind != "clean"}
    return Entry(
        number=number_of(verdicts.count, verdicts.n),
        cut=Cut(*map(max, zip(*(entry.cut for entry in found.values()), strict=True))),
        verdicts=verdicts,
        cells=tuple(cell for entry in found.values() for cell in entry.cells),
        partial=not wanted <= {a.label_without_aim for a in found},
    )

"""Build a report from results: tables as in the papers, their protocols, and significance tests between models."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayclip.reports.accuracy import report_grids, significance_grid
from rayclip.reports.grid import Document, Figure, Part
from rayclip.reports.notes import heading, merge_protocols, shared_note
from rayclip.reports.numbers import sections
from rayclip.reports.prompts import prompt_part
from rayclip.reports.provenance import join_distinct, provenance
from rayclip.reports.published import compare_with_published
from rayclip.reports.recalls import RecallTable, recall_lines, recall_part, recall_tables
from rayclip.reports.results import Results
from rayclip.reports.section import Attack, Section, Subject, natural
from rayclip.reports.to_csv import number_line
from rayclip.types import UserError

_ALL_PAIRS = 60_000  # maximum number of comparisons in a page; beyond it, only those with the baseline


def build(
    results: Results,
    *,
    baseline: str | None = None,
    against: Sequence[str] = (),
    figures: Callable[[Section], Sequence[Figure]] = lambda section: (),
    pairs: bool = False,
) -> Document:
    """Return the report of everything in `results`.

    Args:
        baseline: the model that others are compared with; None is the best one.
        against: published tables to compare with, such as `mmcoa:II` (`published.compare_with_published`).
        figures: returns a section's figures.
        pairs: also compute the counts that a page needs to compare any two models.

    Raises:
        UserError: an unknown paper, table or baseline.
    """
    found, tables = sections(results), recall_tables(results)
    subjects = [s for section in found for s in section.subjects] + [s for table in tables for s, _ in table.rows]
    if baseline is not None and not any(baseline in (s.name, s.model.spec) for s in subjects):
        names = sorted({s.name for s in subjects}, key=natural)
        raise UserError(f"there is no model '{baseline}' in these results: they have {', '.join(names[:12])}.")
    parts: list[Part] = []
    for i, section in enumerate(found, 1):
        title = "Results" if len(found) == 1 else f"Results: {shared_note(section)}"
        parts.append(Part(title=title, grids=tuple(report_grids(section))))
        other = _baseline(section, baseline)
        if other is not None and len(section.subjects) > 1:
            parts.append(Part(title=f"Compared with {other.name}", grids=(significance_grid(section, other),)))
        drawn = [f if i == 1 else replace(f, name=f"{f.name}-section{i}") for f in figures(section)]
        parts.append(Part(title="Figures", figures=drawn))
        parts.append(prompt_part(section))
    parts += [recall_part(tables), *compare_with_published(found, against, tables), provenance(results)]
    return Document(
        title="Robustness report",
        summary=(*_summary(found, tables), *results.notes),
        parts=parts,
        lines=(
            *(line for section in found for line in _lines(section, _baseline(section, baseline))),
            *recall_lines(tables),
            *(line for part in parts for line in part.lines),
        ),
        pairs=[_pairs(section, _baseline(section, baseline)) for section in found] if pairs else (),
    )


def _baseline(section: Section, name: str | None) -> Subject | None:
    if name is None:
        return section.best()
    return next((s for s in section.subjects if name in (s.name, s.model.spec)), None)


def _summary(found: Sequence[Section], tables: Sequence[RecallTable]) -> list[str]:
    def several(count: int, what: str) -> str:
        return f"{count:,} {what}{'' if count == 1 else 's'}"

    models = len({s.key for section in found for s in section.subjects})
    datasets = len({d for section in found for d in section.datasets})
    attacks = len({a.label for section in found for a in section.attacks if a.kind not in ("clean", "worst")})
    verdicts = sum(e.number.n for section in found for e in section.entries.values() if len(e.cells) == 1)
    accuracies = (
        f"{several(models, 'model')} on {several(datasets, 'data set')} under {several(attacks, 'attack')}: "
        f"{several(verdicts, 'verdict')}."
    )
    searchers = len({s.key for table in tables for s, _ in table.rows})
    pairs = len({table.dataset for table in tables})
    searched = f"Retrieval: {several(searchers, 'model')} on {several(pairs, 'set')} of image-caption pairs."
    return [accuracies] * bool(found) + [searched] * bool(tables)


def _lines(section: Section, baseline: Subject | None) -> Iterator[dict[str, Any]]:
    """Yield one line of CSV per number, averages and worst cases included."""
    for subject in section.subjects:
        for attack in section.attacks:
            for dataset in section.columns:
                number = section.number(subject, dataset, attack)
                if number is None:
                    continue
                entry = section.get(subject, dataset, attack)
                cells = () if entry is None else entry.cells
                versus = None
                if baseline is not None and subject != baseline:
                    versus = section.compare(subject, baseline, dataset, attack)
                yield {
                    **number_line(subject, dataset, attack, number),
                    "baseline": "" if versus is None or baseline is None else baseline.name,
                    "only_this_right": "" if versus is None else versus.first,
                    "only_baseline_right": "" if versus is None else versus.second,
                    "p": "" if versus is None else f"{versus.p:.3g}",
                    "protocol": json.dumps({**section.shared, **_settings(section, subject, dataset, attack)}),
                    "cells": "+".join(cell.id for cell in cells),
                    "data": cells[0].data_fingerprint if cells else "",
                    "code": cells[0].code if cells else "",
                    "run": join_distinct(cell.run for cell in cells),
                }


def _settings(section: Section, subject: Subject, dataset: str, attack: Attack) -> Mapping[str, Any]:
    """Return the attack's protocol behind a number; for an average, settings that vary list their data sets."""
    found = {d: e.protocol for d, e in section.behind(subject, dataset, attack).items() if e.protocol}
    return merge_protocols(found) if found else attack.settings


def _pairs(section: Section, baseline: Subject | None) -> dict[str, Any]:
    """Return `[first, second, column, only first right, only second right, n]` for every pair of models, or, if those
    are too many, for each model with the baseline."""
    columns = [(d, a) for d in section.datasets for a in section.attacks]
    subjects = section.subjects
    index = {s: i for i, s in enumerate(subjects)}
    if len(subjects) * (len(subjects) - 1) // 2 * len(columns) <= _ALL_PAIRS:
        chosen = [(a, b) for i, a in enumerate(subjects) for b in subjects[i + 1 :]]
    else:
        chosen = [(s, baseline) for s in subjects if baseline is not None and s != baseline]
    counts = []
    for one, two in chosen:
        for c, (dataset, attack) in enumerate(columns):
            found = section.compare(one, two, dataset, attack)
            if found is not None:
                counts.append([index[one], index[two], c, found.first, found.second, found.n])
    return {
        "models": [s.name for s in subjects],
        "columns": [[d, heading(a.label)] for d, a in columns],
        "counts": counts,
        "baseline": None if baseline is None else index[baseline],
    }

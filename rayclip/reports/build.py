"""Build a report from results: tables as in the papers, their protocols, and significance tests between models."""

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayclip.reports.accuracy import report_grids, significance_grid
from rayclip.reports.beside import compare_with_published
from rayclip.reports.calibration import Calibrations, calibrate, calibration_part
from rayclip.reports.choosing import choose_examples
from rayclip.reports.formats import number_line
from rayclip.reports.grid import Cell, Document, Figure, Grid, Part
from rayclip.reports.model import Model
from rayclip.reports.notes import heading, merge_protocols, shared_note
from rayclip.reports.numbers import sections
from rayclip.reports.recalls import RecallTable, recall_lines, recall_part, recall_tables
from rayclip.reports.referee import Hearing, hear, referee_grid, referee_lines
from rayclip.reports.results import Results, texts
from rayclip.reports.section import Attack, Section, Subject, natural
from rayclip.types import UserError

_MOST_PROMPTS = 8
_ALL_PAIRS = 60_000  # maximum number of comparisons in a page; beyond it, only those with the baseline


def build(
    results: Results,
    *,
    baseline: str | None = None,
    against: Sequence[str] = (),
    figures: Callable[[Section], Sequence[Figure]] = lambda section: (),
    reliability_figures: Callable[[Section, Calibrations], Sequence[Figure]] = lambda section, found: (),
    referee_figures: Callable[[Sequence[Hearing]], Sequence[Figure]] = lambda hearings: (),
    pairs: bool = False,
    calibration: bool = False,
) -> Document:
    """Return the report of everything in `results`.

    Args:
        baseline: the model that others are compared with; None is the best one.
        against: published tables to compare with, such as `mmcoa:II` (`beside.compare_with_published`).
        figures, reliability_figures, referee_figures: return a section's figures, and those of the referee's tables.
        pairs: also compute the counts that a page needs to compare any two models.
        calibration: also read confidences: expected calibration errors, and reliability diagrams if there are figures.

    Raises:
        UserError: an unknown paper, table or baseline.
    """
    found, tables = sections(results), recall_tables(results)
    subjects = [s for section in found for s in section.subjects] + [s for table in tables for s, _ in table.rows]
    if baseline is not None and not any(baseline in (s.name, s.model.spec) for s in subjects):
        names = sorted({s.name for s in subjects}, key=natural)
        raise UserError(f"there is no model '{baseline}' in these results: they have {', '.join(names[:12])}.")
    parts: list[Part] = []
    errors: dict[tuple[Subject, str, str], float] = {}
    for i, section in enumerate(found, 1):
        title = "Results" if len(found) == 1 else f"Results: {shared_note(section)}"
        parts.append(Part(title=title, grids=tuple(report_grids(section))))
        other = _baseline(section, baseline)
        if other is not None and len(section.subjects) > 1:
            parts.append(Part(title=f"Compared with {other.name}", grids=(significance_grid(section, other),)))
        drawn = list(figures(section))
        if calibration:
            made = calibrate(section)
            errors |= {key: each.ece for key, each in made.items()}
            parts.append(calibration_part(section, made))
            drawn += reliability_figures(section, made)
        drawn = [f if i == 1 else replace(f, name=f"{f.name}-section{i}") for f in drawn]
        parts.append(Part(title="Figures", figures=drawn))
        parts.append(prompt_part(section))
    parts += [
        recall_part(tables),
        referee_part(found, referee_figures),
        *compare_with_published(found, against, tables),
        provenance(results),
    ]
    return Document(
        title="Robustness report",
        summary=(*_summary(found, tables), *results.notes),
        parts=parts,
        lines=(
            *(line for section in found for line in _lines(section, _baseline(section, baseline), errors)),
            *recall_lines(tables),
            *(line for part in parts for line in part.lines),
        ),
        pairs=[_pairs(section, _baseline(section, baseline)) for section in found] if pairs else (),
    )


def referee_part(
    found: Sequence[Section], figures: Callable[[Sequence[Hearing]], Sequence[Figure]] = lambda hearings: ()
) -> Part:
    """Return a part on models that were attacked both ignoring their defence and through it; empty without any."""
    hearings = hear(found)
    return Part(
        title="What defences claim, and what is left",
        grids=[referee_grid(hearing) for hearing in hearings],
        figures=figures(hearings),
        lines=[line for hearing in hearings for line in referee_lines(hearing)],
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


def _lines(
    section: Section, baseline: Subject | None, errors: Mapping[tuple[Subject, str, str], float]
) -> Iterator[dict[str, Any]]:
    """Yield one line of CSV per number, averages and worst cases included; `errors` of calibration have a column."""
    places = [(s, a, d) for s in section.subjects for a in section.attacks for d in section.columns]
    for subject, attack, dataset in places:
        number, entry = section.number(subject, dataset, attack), section.get(subject, dataset, attack)
        if number is None:
            continue
        cells = () if entry is None else entry.cells
        versus = None
        if baseline is not None and subject != baseline:
            versus = section.compare(subject, baseline, dataset, attack)
        yield {
            **number_line(subject, dataset, attack, number),
            **(
                {"ece": f"{errors[key]:.4f}" if (key := (subject, dataset, attack.label)) in errors else ""}
                if errors
                else {}
            ),
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
    chosen = list(itertools.combinations(subjects, 2))
    if len(chosen) * len(columns) > _ALL_PAIRS:
        chosen = [(s, baseline) for s in subjects if baseline is not None and s != baseline]
    counts = [
        [index[one], index[two], c, found.first, found.second, found.n]
        for one, two in chosen
        for c, (dataset, attack) in enumerate(columns)
        if (found := section.compare(one, two, dataset, attack)) is not None
    ]
    return {
        "models": [s.name for s in subjects],
        "columns": [[d, heading(a.label)] for d, a in columns],
        "counts": counts,
        "baseline": None if baseline is None else index[baseline],
    }


def prompt_part(section: Section) -> Part:
    """Return a part with a table per model, of its first prompts; empty if the evaluation kept none."""
    grids = []
    for example in choose_examples(section, ("text", "multimodal"), lambda cell: bool(texts(cell))):
        rows = []
        for row in texts(example.cell)[:_MOST_PROMPTS]:
            changes = ", ".join(changed_words(row["clean"], row["adversarial"]))
            rows.append((row["class"], [Cell(text=text) for text in (row["clean"], row["adversarial"], changes)]))
        where = f"{example.subject.name} on {example.dataset} before and after {heading(example.attack.label)}"
        header = ("class", "prompt", "attacked", "changed words")
        grids.append(Grid(title=where, header=header, rows=rows))
    return Part(title="Attacked prompts", grids=grids)


def changed_words(before: str, after: str) -> Iterator[str]:
    """Yield what changed between two texts, ignoring case: `zero → deline`, `+ added`, `− left out`."""
    old, new = before.split(), after.split()
    matcher = difflib.SequenceMatcher(None, [w.lower() for w in old], [w.lower() for w in new], autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        left, came = " ".join(old[i:j]), " ".join(new[k:m])
        if kind != "equal":
            yield f"{left} → {came}" if left and came else f"− {left}" if left else f"+ {came}"


def provenance(results: Results) -> Part:
    """Return a part with a table of the models and one of the data sets."""
    names = results.names
    models = [(names[fingerprint], _about(model, results)) for fingerprint, model in results.models.items()]
    data = {p.data_fingerprint: (p.dataset, "") for p in results.pairs}
    data |= {c.data_fingerprint: (c.dataset, c.data) for c in results.cells}
    sets = [(name, {"content": content, "specification": spec}) for content, (name, spec) in data.items()]
    notes = ["Fingerprints are equal for equal weights and equal data, whatever their names"]
    notes += [f"MLflow: {tracker}" for tracker in results.trackers]
    grids = (_facts_grid("models", "model", models, notes), _facts_grid("data sets", "data set", sets))
    return Part(title="Where the numbers come from", grids=grids, reference=True)


def _facts_grid(
    title: str, first: str, facts: Sequence[tuple[str, Mapping[str, str]]], notes: Sequence[str] = ()
) -> Grid:
    facts = sorted(facts, key=lambda fact: natural(fact[0]))
    columns = [column for column in facts[0][1] if any(about[column] for _, about in facts)]
    rows = [(name, [Cell(text=about[column]) for column in columns]) for name, about in facts]
    return Grid(title=title, header=(first, *columns), rows=rows, notes=notes)


def _about(model: Model, results: Results) -> dict[str, str]:
    mine = [cell for cell in results.cells if cell.model.fingerprint == model.fingerprint]
    lineage = model.lineage or {}
    data = lineage.get("data") or {}
    trained_on = f"{data.get('name', model.trained_on)} {data.get('fingerprint', '')}".strip()
    return {
        "weights": model.fingerprint,
        "specification": model.spec,
        "method": model.method or "",
        "settings": lineage.get("digest", "not known") if model.method else "",
        "trained on": trained_on if model.method else "",
        "evaluated by rayclip": join_distinct(cell.code for cell in mine),
        "MLflow runs": join_distinct(cell.run for cell in mine),
    }


def join_distinct(values: Iterable[str]) -> str:
    """Join the distinct non-empty values."""
    return ", ".join(dict.fromkeys(value for value in values if value))

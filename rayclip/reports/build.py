"""Build a report from results: tables as in the papers, their protocols, and significance tests between models."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayclip.reports.document import Cell, Document, Figure, Grid, Part, accuracy
from rayclip.reports.numbers import AVERAGE, Attack, Entry, Section, Subject, sections
from rayclip.reports.origins import joined, origins
from rayclip.reports.recalls import RecallTable, recall_lines, recall_parts, recall_tables
from rayclip.reports.results import Results, natural
from rayclip.reports.table import SHOWN, across, cut_notes, heading, in_one_breath, resolution_note
from rayclip.types import Cut, UserError

SIGNIFICANT = 0.05
_ALL_PAIRS = 60_000  # maximum number of comparisons in a page; beyond it, only those with the baseline


def build(
    results: Results,
    *,
    baseline: str | None = None,
    against: Callable[[Sequence[Section], Sequence[RecallTable]], Sequence[Part]] = lambda found, tables: (),
    figures: Callable[[Section], Sequence[Figure]] = lambda section: (),
    pairs: bool = False,
) -> Document:
    """Return the report of everything in `results`.

    Args:
        baseline: the model that others are compared with; None is the best one.
        against: returns the parts that compare with published numbers (`beside.beside`).
        figures: returns a section's figures.
        pairs: also compute the counts that a page needs to compare any two models.

    Raises:
        UserError: there is no model `baseline`.
    """
    found, tables = sections(results), recall_tables(results)
    parts: list[Part] = []
    for i, section in enumerate(found, 1):
        title = "Results" if len(found) == 1 else f"Results: {said(section.shared)}"
        parts.append(Part(title=title, grids=tuple(accuracy_grids(section))))
        with_whom = _baseline(section, baseline)
        if with_whom is not None and len(section.subjects) > 1:
            parts.append(Part(title=f"Compared with {with_whom.name}", grids=(significance_grid(section, with_whom),)))
        drawn = tuple(f if i == 1 else replace(f, name=f"{f.name}-section{i}") for f in figures(section))
        if drawn:
            parts.append(Part(title="Figures", figures=drawn))
    parts += recall_parts(tables)
    subjects = [s for section in found for s in section.subjects] + [s for table in tables for s, _ in table.rows]
    if baseline is not None and not any(baseline in (s.name, s.model.spec) for s in subjects):
        names = sorted({s.name for s in subjects}, key=natural)
        raise UserError(f"there is no model '{baseline}' in these results: they have {', '.join(names[:12])}.")
    parts += [*against(found, tables), origins(results)]
    return Document(
        title="Robustness report",
        summary=(*_summary(found, tables), *results.notes),
        parts=tuple(parts),
        lines=(
            *(line for section in found for line in _lines(section, _baseline(section, baseline))),
            *recall_lines(tables),
            *(line for part in parts for line in part.lines),
        ),
        pairs=tuple(_pairs(section, _baseline(section, baseline)) for section in found) if pairs else (),
    )


def accuracy_grids(section: Section) -> Iterator[Grid]:
    """Yield the accuracy tables.

    One data set: a column per attack. Several: the averages, then for each attack a table with a column per data set.
    """
    overall = section.overall
    several = overall == AVERAGE
    title = f"average over {len(section.datasets)} data sets" if several else overall
    yield _grid(
        section,
        name=f"accuracy-{'average' if several else overall}",
        title=f"{title}: accuracy in %",
        columns=[(heading(a.label), overall, a) for a in section.attacks],
        notes=["The average gives every data set the same weight"] if several else [],
    )
    if several:
        for attack in section.attacks:
            yield _grid(
                section,
                name=f"accuracy-{attack.label}",
                title=f"{heading(attack.label)}: accuracy in %",
                columns=[(dataset, dataset, attack) for dataset in section.columns],
                notes=[],
            )


def _grid(
    section: Section, *, name: str, title: str, columns: Sequence[tuple[str, str, Attack]], notes: Sequence[str]
) -> Grid:
    ranked = [section.ranked(dataset, attack) for _, dataset, attack in columns]
    highest = [max((x.top1 for x in column.values()), default=0.0) for column in ranked]
    rows, partial = [], False
    for subject in section.subjects:
        cells = []
        for column, top, (_, dataset, attack) in zip(ranked, highest, columns, strict=True):
            fewer = section.partial(subject, dataset, attack)
            partial |= fewer
            best = len(column) > 1 and subject in column and column[subject].top1 == top
            cells.append(accuracy(section.number(subject, dataset, attack), best=best, mark="†" if fewer else ""))
        rows.append((subject.name, tuple(cells)))
    attacks = list(dict.fromkeys(attack for _, _, attack in columns))
    used = [e for s in section.subjects for d in section.datasets for a in attacks if (e := section.get(s, d, a))]
    return Grid(
        name=name,
        title=title,
        header=("model", *(column for column, _, _ in columns)),
        rows=tuple(rows),
        notes=(
            *_sizes(used),
            *notes,
            *(["† over fewer attacks than the others of its column, and not ranked with them"] if partial else []),
            *attack_notes(section, attacks),
            *_defense_notes(section),
            *cut_notes(_cut(section, [dataset for _, dataset, _ in columns], attacks)),
            said(section.shared),
        ),
    )


def _cut(section: Section, shown: Sequence[str], attacks: Sequence[Attack]) -> Iterator[tuple[str, Cut]]:
    """Yield the truncated texts by model, and by data set if there are several."""
    datasets = section.datasets if AVERAGE in shown else list(dict.fromkeys(shown))
    for subject in section.subjects:
        for dataset in datasets:
            for attack in attacks:
                entry = section.get(subject, dataset, attack)
                owner = subject.name if len(datasets) == 1 else f"{subject.name} on {dataset}"
                yield from ((owner, cell.cut) for cell in ([] if entry is None else entry.cells))


def significance_grid(section: Section, baseline: Subject) -> Grid:
    """Return a table of each model's difference to the baseline, with McNemar's test.

    One data set: a column per attack. Several: a column per data set, under the main attack.
    """
    several = len(section.datasets) > 1
    columns = (
        [(d, d, section.main) for d in section.datasets]
        if several
        else [(heading(a.label), section.datasets[0], a) for a in section.attacks]
    )
    rows = []
    for subject in (s for s in section.subjects if s != baseline):
        cells = []
        for _, dataset, attack in columns:
            found = section.compare(subject, baseline, dataset, attack)
            if found is None:
                cells.append(Cell())
                continue
            cells.append(
                Cell(
                    text=signed(found.difference),
                    note=spell_p(found.p),
                    value=found.difference,
                    best=found.p < SIGNIFICANT,
                )
            )
        rows.append((subject.name, tuple(cells)))
    where = f" {under(section.main)}" if several else ""
    return Grid(
        name=f"mcnemar-{section.main.label if several else section.datasets[0]}",
        title=f"difference to {baseline.name}{where} in percentage points",
        header=("model", *(column for column, _, _ in columns)),
        rows=tuple(rows),
        notes=(
            "On the same samples; p of McNemar's exact test, two-sided, not corrected for the number of comparisons",
            f"Bold: p < {SIGNIFICANT}",
        ),
    )


def under(attack: Attack) -> str:
    """Return `under pgd-10 1/255` or `in the worst case within 1/255`."""
    if attack.kind != "worst":
        return f"under {heading(attack.label)}"
    return "in the worst case" + (f" within {'l2 ' if attack.norm == 'l2' else ''}{attack.eps}" if attack.eps else "")


def signed(difference: float) -> str:
    """Return a difference with its sign: `+3.1`, `−0.4`, `0.0`."""
    text = f"{difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def spell_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _baseline(section: Section, name: str | None) -> Subject | None:
    if name is None:
        return section.best()
    return next((s for s in section.subjects if name in (s.name, s.model.spec)), None)


def said(shared: Mapping[str, Any]) -> str:
    return (
        f"prompt '{shared['template']}', {shared.get('class_names') or 'curated'} class names, "
        f"{resolution_note(shared)}, seed {shared['seed']}"
    )


def _sizes(entries: Iterable[Entry]) -> list[str]:
    sizes = sorted({entry.number.n for entry in entries})
    if not sizes:
        return []
    spelled = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [f"n = {spelled} samples, 95 % Wilson intervals, best in bold"]


def attack_notes(section: Section, attacks: Sequence[Attack]) -> list[str]:
    """Return notes with the settings of each attack, and on which models and data sets they differ."""
    plain: list[tuple[str, str]] = []
    worst = []
    for attack in attacks:
        if attack.kind == "worst":
            of = ", ".join(heading(label) for label in attack.settings["of"] if label != "clean")
            worst.append(f"{heading(attack.label)}: right under every one of {of}, per sample")
            continue
        described: dict[str, dict[str, list[str]]] = {}  # settings -> kind of model -> data sets
        for subject in section.subjects:
            for dataset in section.datasets:
                entry = section.get(subject, dataset, attack)
                if entry is None:
                    continue
                protocol = entry.cells[0].protocol
                kept = ", ".join(f"{k} {v}" for k, v in protocol.items() if k in SHOWN)
                kept += f", {protocol['precision']}" if kept and protocol.get("precision", "fp32") != "fp32" else ""
                where = "defended models" if subject.defense != "none" else "undefended models"
                whom = described.setdefault(kept, {}).setdefault(where, [])
                whom += [dataset] if dataset not in whom else []
        everywhere = {d for by_whom in described.values() for datasets in by_whom.values() for d in datasets}
        everyone = {who for by_whom in described.values() for who in by_whom}
        for kept, by_whom in described.items():
            only = f" on {next(iter(by_whom))}" if len(described) > 1 and len(by_whom) == 1 else ""
            held = list(dict.fromkeys(d for datasets in by_whom.values() for d in datasets))
            if len(held) < len(everywhere):  # some attacks change their parts on few classes
                only = f" on {', '.join(held)}" if len(by_whom) == len(everyone) else f"{only}, {', '.join(held)}"
            plain += [(f"{heading(attack.label)}{only}", kept)] if kept else []
    return [*in_one_breath(plain), *worst]


def _defense_notes(section: Section) -> list[str]:
    described = {e.cells[0].defense: str(e.cells[0].protocol.get("defense")) for e in section.entries.values()}
    del_none = {label: whole for label, whole in described.items() if label != "none"}
    if not del_none:
        return []
    notes = [f"{label}: {whole}" for label, whole in del_none.items() if whole != label]
    draws = max(e.cells[0].protocol.get("draws", 1) for e in section.entries.values())
    notes.append("attacks ignore the defence unless a column says how they go through it")
    return notes + ([f"through a random defence each query averages {draws} draws"] if draws > 1 else [])


def _summary(found: Sequence[Section], tables: Sequence[RecallTable]) -> list[str]:
    def several(count: int, what: str) -> str:
        return f"{count:,} {what}{'' if count == 1 else 's'}"

    models = len({s.key for section in found for s in section.subjects})
    datasets = len({d for section in found for d in section.datasets})
    attacks = len({a.label for section in found for a in section.attacks if a.kind not in ("clean", "worst")})
    verdicts = sum(e.number.n for section in found for e in section.entries.values() if len(e.cells) == 1)
    said = (
        f"{several(models, 'model')} on {several(datasets, 'data set')} under {several(attacks, 'attack')}: "
        f"{several(verdicts, 'verdict')}."
    )
    searchers = len({s.key for table in tables for s, _ in table.rows})
    pairs = len({table.dataset for table in tables})
    searched = f"Retrieval: {several(searchers, 'model')} on {several(pairs, 'set')} of image-caption pairs."
    return [said] * bool(found) + [searched] * bool(tables)


def _lines(section: Section, baseline: Subject | None) -> Iterator[dict[str, Any]]:
    """Yield one line of CSV per number, averages and worst cases included."""
    for subject in section.subjects:
        for attack in section.attacks:
            for dataset in section.columns:
                number = section.number(subject, dataset, attack)
                if number is None:
                    continue
                entry = section.get(subject, dataset, attack)
                settings = _settings(section, subject, dataset, attack)
                versus = None
                if entry is not None and baseline is not None and subject != baseline:
                    versus = section.compare(subject, baseline, dataset, attack)
                yield {
                    **subject.described(),
                    "dataset": dataset,
                    "attack": attack.label,
                    "kind": attack.kind,
                    "eps": settings.get("eps", ""),
                    "norm": attack.norm if attack.eps is not None else "",
                    "n": number.n,
                    "top1": f"{number.top1:.4f}",
                    "ci_low": f"{number.low:.4f}",
                    "ci_high": f"{number.high:.4f}",
                    "baseline": "" if versus is None or baseline is None else baseline.name,
                    "only_this_right": "" if versus is None else versus.first,
                    "only_baseline_right": "" if versus is None else versus.second,
                    "p": "" if versus is None else f"{versus.p:.3g}",
                    "protocol": json.dumps({**section.shared, **settings}),
                    "cells": "" if entry is None else "+".join(cell.id for cell in entry.cells),
                    "data": "" if entry is None else entry.cells[0].data_fingerprint,
                    "code": "" if entry is None else entry.cells[0].code,
                    "run": "" if entry is None else joined(cell.run for cell in entry.cells),
                }


def _settings(section: Section, subject: Subject, dataset: str, attack: Attack) -> Mapping[str, Any]:
    """Return the attack's protocol behind a number; for an average, settings that vary list their data sets."""
    found = {
        d: entry.cells[0].protocol
        for d in (section.datasets if dataset == AVERAGE else [dataset])
        if (entry := section.get(subject, d, attack)) is not None and len(entry.cells) == 1
    }
    return across(found) if found else attack.settings


def _pairs(section: Section, baseline: Subject | None) -> dict[str, Any]:
    """Return the counts of samples that only one of two models gets right.

    `counts` has entries `[first, second, column, only first, only second, n]`, for every pair of models, or, if those
    are too many, for each model with the baseline.
    """
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

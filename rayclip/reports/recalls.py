"""Retrieval tables: recall at 1, 5, 10 of texts for an image (TR) and of images for a text (IR).

From result files a table per data set and attack with a row per model, as in MMCoA's table VI; from a command's rows a
row per model, or with attacks a table per model and a row per attack.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayclip.evaluation.retrieval import AS_WRITTEN, RecallRow
from rayclip.reports.formats import number_line
from rayclip.reports.grid import Grid, Part, accuracy
from rayclip.reports.notes import cut_notes, group_equal, heading, resolution_note
from rayclip.reports.numbers import dataset_names, number_of, sort_subjects
from rayclip.reports.results import JudgedPairs, Results
from rayclip.reports.section import Attack, Number, Subject, kind_of, natural
from rayclip.types import Cut

_SETTINGS = (
    ("steps", "step", "norm", "start", "stop", "seed", "classes"),
    ("substitutes", "k", "n", "constrain", "objective", "changes", "threshold", "offset", "combinations", "max_length"),
    ("text_weight", "scales", "noise"),
)
Recalls = Mapping[tuple[str, int], Number]  # by direction (TR before IR) and k


@dataclass(frozen=True, kw_only=True)
class RecallTable:
    """Comparable recalls: one data set, one attack, one protocol."""

    dataset: str
    attack: Attack
    rows: tuple[tuple[Subject, JudgedPairs], ...]


def recalls_of(pairs: JudgedPairs) -> Recalls:
    """Return the recalls in percent; the interval treats queries as independent (`RecallRow`)."""
    return {(r.direction, r.k): number_of(r.right, r.n) for r in pairs.recalls}


def recall_tables(results: Results) -> list[RecallTable]:
    """Return a table for each data set and attack."""
    names, datasets = results.names, dataset_names(results.pairs)
    groups: dict[tuple[str, str, str], dict[Subject, JudgedPairs]] = {}
    for pairs in results.pairs:
        key = pairs.data_fingerprint, pairs.attack, json.dumps(pairs.protocol, sort_keys=True)
        subject = Subject(model=pairs.model, scorer="", defense="none", name=names[pairs.model.fingerprint])
        groups.setdefault(key, {})[subject] = pairs
    found = []
    for (content, label, _), members in groups.items():
        protocol = next(iter(members.values())).protocol
        attack = Attack(label=label, kind=kind_of(protocol), settings=protocol)
        rows = tuple((subject, members[subject]) for subject in sort_subjects(members, results.order))
        found.append(RecallTable(dataset=datasets[content], attack=attack, rows=rows))
    return sorted(found, key=lambda t: (natural(t.dataset), t.attack.order))


def recall_part(tables: Sequence[RecallTable]) -> Part:
    """Return the report's part about retrieval."""
    grids = []
    for table in tables:
        label, settings = table.attack.label, table.attack.settings
        rows = {subject.name: recalls_of(pairs) for subject, pairs in table.rows}
        cut = cut_notes((subject.name, pairs.cut) for subject, pairs in table.rows)
        grids.append(_grid(f"{table.dataset}, {heading(label)}", "model", rows, {label: settings}, cut))
    return Part(title="Retrieval", grids=grids)


def recall_grids(rows: Sequence[RecallRow]) -> list[Grid]:
    """Return the tables of a command's rows, of one data set: one of all models, or with attacks one per model."""
    if {row.attack for row in rows} == {"clean"}:
        return [_grid_of_rows(rows, "model", rows[0].dataset)]
    return [
        _grid_of_rows([row for row in rows if row.model == model], "attack", f"{model} on {rows[0].dataset}")
        for model in dict.fromkeys(row.model for row in rows)
    ]


def _grid_of_rows(rows: Sequence[RecallRow], first: str, title: str) -> Grid:
    found: dict[str, dict[tuple[str, int], Number]] = {}
    for row in rows:
        number = Number(top1=row.recall, low=row.ci_low, high=row.ci_high, n=row.n)
        found.setdefault(heading(row.attack) if first == "attack" else row.model, {})[row.direction, row.k] = number
    cut = cut_notes((row.model, Cut(row.cut_texts, row.cut_for_substitutes)) for row in rows)
    return _grid(title, first, found, {row.attack: row.protocol for row in rows}, cut)


def _grid(
    title: str,
    first: str,
    rows: Mapping[str, Recalls],
    described: Mapping[str, Mapping[str, Any]],
    cut: Sequence[str],
) -> Grid:
    """Return a table; `described` are the protocols by attack label. The best of several models is bold."""
    columns = list(dict.fromkeys(column for recalls in rows.values() for column in recalls))
    several = first == "model" and len(rows) > 1
    best = {c: max(recalls[c].top1 for recalls in rows.values() if c in recalls) for c in columns}
    cells = [
        (name, [accuracy(x := recalls.get(c), best=several and x is not None and x.top1 == best[c]) for c in columns])
        for name, recalls in rows.items()
    ]
    protocol = next(iter(described.values()))
    notes = [
        f"n = {protocol['images']:,} images (TR) and {protocol['captions']:,} captions (IR), 95 % Wilson intervals"
        f"{', best in bold' * several}",
        "TR: any caption of the image among the first k; IR: the caption's image among the first k; ties count "
        f"{protocol['ties']}",
    ]
    for keys in _SETTINGS:
        notes += group_equal(
            (heading(attack), settings)
            for attack, own in described.items()
            if (settings := ", ".join(f"{k} {own[k]}" for k in keys if k in own))
        )
    changed = [heading(attack) for attack, own in described.items() if own["text"] != AS_WRITTEN]
    text = f"{AS_WRITTEN}{', adversarial under ' + ', '.join(changed) if changed else ''}"
    notes.append(f"{text.capitalize()}, {resolution_note(protocol)}, {protocol['precision']}")
    header = (first, *(f"{direction.upper()}@{k}" for direction, k in columns))
    return Grid(title=f"{title}: recall in %", header=header, rows=cells, notes=(*notes, *cut))


def recall_lines(tables: Sequence[RecallTable]) -> Iterator[Mapping[str, Any]]:
    """Yield one line of CSV per number."""
    for table in tables:
        for subject, pairs in table.rows:
            for (direction, k), number in recalls_of(pairs).items():
                yield {
                    **number_line(subject, table.dataset, table.attack, number, f"{direction}_r@{k}"),
                    "protocol": json.dumps(table.attack.settings),
                    "cells": pairs.id,
                }

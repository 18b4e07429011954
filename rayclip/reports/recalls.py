"""Retrieval results in a report: a table per data set and attack with a row per model, as in MMCoA's table VI."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayclip.evaluation.recall import Direction
from rayclip.reports.document import Grid, Part, accuracy
from rayclip.reports.numbers import Attack, Number, Subject, attack_order, dataset_names, kind_of, subject_order
from rayclip.reports.results import JudgedPairs, Results, natural
from rayclip.reports.retrieval import protocol_notes
from rayclip.reports.table import cut_notes, heading


@dataclass(frozen=True, kw_only=True)
class RecallTable:
    """Comparable recalls: one data set, one attack, one protocol."""

    dataset: str
    attack: Attack
    rows: tuple[tuple[Subject, JudgedPairs], ...]

    @property
    def columns(self) -> list[tuple[Direction, int]]:
        """The (direction, k) pairs of the columns, TR before IR, each by k."""
        return list(dict.fromkeys((r.direction, r.k) for _, pairs in self.rows for r in pairs.recalls))


def recall(pairs: JudgedPairs, direction: str, k: int) -> Number | None:
    """Return recall at k in percent, or None; the interval treats queries as independent (`RecallRow`)."""
    found = (Number.of(r.right, r.n) for r in pairs.recalls if (r.direction, r.k) == (direction, k))
    return next(found, None)


def recall_tables(results: Results) -> list[RecallTable]:
    """Return a table for each data set and attack."""
    names, datasets = results.names, dataset_names(results.pairs)
    rank = {name: i for i, name in enumerate(results.order)}
    groups: dict[tuple[str, str, str], list[JudgedPairs]] = {}
    for pairs in results.pairs:
        key = pairs.data_fingerprint, pairs.attack, json.dumps(pairs.protocol, sort_keys=True)
        groups.setdefault(key, []).append(pairs)
    found = []
    for members in groups.values():
        first = members[0]
        rows = [
            (Subject(model=p.model, scorer="", defense="none", name=names[p.model.fingerprint]), p) for p in members
        ]
        attack = Attack(label=first.attack, kind=kind_of(first.protocol), settings=first.protocol)
        rows.sort(key=lambda row: subject_order(row[0], rank))
        found.append(RecallTable(dataset=datasets[first.data_fingerprint], attack=attack, rows=tuple(rows)))
    return sorted(found, key=lambda t: (natural(t.dataset), attack_order(t.attack)))


def recall_parts(tables: Sequence[RecallTable]) -> list[Part]:
    """Return the report's part about retrieval; empty if there are no recalls."""
    return [Part(title="Retrieval", grids=tuple(map(_grid, tables)))] if tables else []


def _grid(table: RecallTable) -> Grid:
    columns, settings = table.columns, table.attack.settings
    numbers = [[recall(pairs, direction, k) for direction, k in columns] for _, pairs in table.rows]
    best = [max((x.top1 for x in column if x), default=0.0) for column in zip(*numbers, strict=True)]
    several = len(numbers) > 1
    rows = []
    for (subject, _), row in zip(table.rows, numbers, strict=True):
        cells = [accuracy(x, best=several and x is not None and x.top1 == b) for x, b in zip(row, best, strict=True)]
        rows.append((subject.name, tuple(cells)))
    return Grid(
        name=f"retrieval-{table.dataset}-{table.attack.label}",
        title=f"{table.dataset}, {heading(table.attack.label)}: recall in %",
        header=("model", *(f"{direction.upper()}@{k}" for direction, k in columns)),
        rows=tuple(rows),
        notes=(
            f"n = {settings['images']:,} images (TR) and {settings['captions']:,} captions (IR), 95 % Wilson intervals"
            f"{', best in bold' * several}",
            *protocol_notes({table.attack.label: settings}),
            *cut_notes((subject.name, pairs.cut) for subject, pairs in table.rows),
        ),
    )


def recall_lines(tables: Sequence[RecallTable]) -> Iterator[Mapping[str, Any]]:
    """Yield one line of CSV per number, with `build`'s column names where the meaning is the same."""
    for table in tables:
        settings = table.attack.settings
        for subject, pairs in table.rows:
            for direction, k in table.columns:
                number = recall(pairs, direction, k)
                if number is not None:
                    yield {
                        **subject.described(),
                        "dataset": table.dataset,
                        "attack": table.attack.label,
                        "kind": table.attack.kind,
                        "eps": settings.get("eps", ""),
                        "norm": table.attack.norm if table.attack.eps is not None else "",
                        "n": number.n,
                        "ci_low": f"{number.low:.4f}",
                        "ci_high": f"{number.high:.4f}",
                        "metric": f"{direction}_r@{k}",
                        "recall": f"{number.top1:.4f}",
                        "protocol": json.dumps(settings),
                        "cells": pairs.id,
                    }

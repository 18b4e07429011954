"""Tables of a command that has just ended, from its rows: what the terminal shows, `table.md` holds and MLflow gets."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rayclip.reports.accuracy import dataset_grid
from rayclip.reports.grid import Grid
from rayclip.reports.model import Model
from rayclip.reports.section import SHARED, Attack, Entry, Number, Section, Subject, kind_of
from rayclip.reports.to_markdown import grid_markdown
from rayclip.reports.to_terminal import show
from rayclip.types import WORST, Cut, Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def result_grids(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[Grid]:
    """Return one table per data set, and one with the average if there are several data sets.

    Numbers that cannot be compared, such as those of different prompts, are in different tables.

    Args:
        labels: display names of models, by the name in the rows; models that are missing keep the rows' name.
    """
    sections = row_sections(rows, labels or {})
    return [dataset_grid(section, dataset) for section in sections for dataset in section.columns]


def row_sections(rows: Sequence[Row], labels: Mapping[str, str]) -> list[Section]:
    """Return the rows as sections of comparable numbers; all in the order of appearance, worst cases last."""
    groups: dict[str, list[Row]] = {}
    group_of: dict[str, list[Row]] = {}  # by cell
    for row in rows:
        if not row.is_worst:
            key = json.dumps({name: row.protocol.get(name) for name in SHARED})
            group_of[row.cell] = groups.setdefault(key, [])
            groups[key].append(row)
    for row in rows:
        if row.is_worst:
            group_of[row.cell.partition("+")[0]].append(row)
    return [_section(json.loads(key), members, labels) for key, members in groups.items()]


def _section(shared: Mapping[str, object], rows: Sequence[Row], labels: Mapping[str, str]) -> Section:
    attacks: dict[str, Attack] = {}
    for row in (row for row in rows if not row.is_worst):
        attacks.setdefault(row.attack, Attack(label=row.attack, kind=kind_of(row.protocol), settings=row.protocol))
    of = {label: dict.fromkeys(a for r in rows if r.attack == label for a in _members(r)) for label in _worst(rows)}
    for row in (row for row in rows if row.is_worst):
        settings = {**row.protocol, "attack": WORST, "of": list(of[row.attack])}
        attacks.setdefault(row.attack, Attack(label=row.attack, kind="worst", settings=settings))

    def without_aim(labels: Sequence[str]) -> set[str]:
        return {attacks[label].label_without_aim for label in labels if label in attacks and label != "clean"}

    subjects: dict[tuple[str, str, str], Subject] = {}
    entries = {}
    for row in rows:
        model = Model(fingerprint=row.model, spec=row.model, label=labels.get(row.model, row.model))
        key = row.model, row.scorer, row.defense
        made = Subject(model=model, scorer=row.scorer, defense=row.defense, name=row.who(labels))
        entries[subjects.setdefault(key, made), row.dataset, row.attack] = Entry(
            number=Number(top1=row.top1, low=row.ci_low, high=row.ci_high, n=row.n),
            protocol={} if row.is_worst else row.protocol,
            cut=Cut(row.cut_texts, row.cut_for_substitutes),
            partial=row.is_worst and not without_aim(list(of[row.attack])) <= without_aim(_members(row)),
        )
    return Section(
        shared=shared,
        subjects=list(subjects.values()),
        datasets=list(dict.fromkeys(row.dataset for row in rows)),
        attacks=list(attacks.values()),
        entries=entries,
    )


def _worst(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.attack for row in rows if row.is_worst))


def _members(row: Row) -> list[str]:
    """Return the attacks of a worst case."""
    return row.protocol.get("worst_of", [])


def markdown_tables(rows: Sequence[Row], labels: Mapping[str, str]) -> str:
    """Return the tables in Markdown."""
    return "\n\n".join(grid_markdown(grid) for grid in result_grids(rows, labels)) + "\n"


def show_rows(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> None:
    """Print the tables to standard output."""
    show(result_grids(rows, labels))


def rows_json(rows: "Sequence[DataclassInstance]") -> str:
    """Return rows of results or recalls in the JSON form of `--json` and `results.json`."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"

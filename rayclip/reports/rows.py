"""Tables of a command that has just ended, from its rows: what the terminal shows, `table.md` holds and MLflow gets."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rayclip.reports.accuracy import dataset_grid
from rayclip.reports.formats import grid_markdown
from rayclip.reports.grid import Cell, Grid, number_cell
from rayclip.reports.model import Model
from rayclip.reports.section import SHARED, Attack, Entry, Number, Section, Subject, kind_of
from rayclip.reports.to_terminal import show
from rayclip.types import WORST, Cut, Ranking, Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from rayclip.evaluation.front import Score


def result_grids(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[Grid]:
    """Return one table per data set, and one with the average if there are several data sets.

    Numbers that cannot be compared, such as those of different prompts, are in different tables. Models have the name
    in the rows unless `labels` has another for it.
    """
    sections = row_sections(rows, labels or {})
    return [dataset_grid(section, dataset) for section in sections for dataset in section.columns]


def row_sections(rows: Sequence[Row], labels: Mapping[str, str]) -> list[Section]:
    """Return the rows as sections of comparable numbers; all in the order of appearance, worst cases last."""
    groups: dict[str, list[Row]] = {}
    group_of: dict[str, str] = {}  # by cell
    for row in sorted(rows, key=lambda row: row.is_worst):
        own = json.dumps({name: row.protocol.get(name) for name in SHARED})
        key = group_of[row.cell] = group_of[row.cell.partition("+")[0]] if row.is_worst else own
        groups.setdefault(key, []).append(row)
    return [_section(json.loads(key), members, labels) for key, members in groups.items()]


def _section(shared: Mapping[str, object], rows: Sequence[Row], labels: Mapping[str, str]) -> Section:
    members: dict[str, dict[str, None]] = {}  # of worst cases, anywhere in the section
    for row in rows:
        members.setdefault(row.attack, {}).update(dict.fromkeys(_members(row)))
    attacks: dict[str, Attack] = {}
    for row in rows:
        settings = {**row.protocol, "attack": WORST, "of": [*members[row.attack]]} if row.is_worst else row.protocol
        kind = "worst" if row.is_worst else kind_of(row.protocol)
        attacks.setdefault(row.attack, Attack(label=row.attack, kind=kind, settings=settings))

    def without_aim(labels: Iterable[str]) -> set[str]:
        return {attacks[label].label_without_aim for label in labels if label in attacks and label != "clean"}

    subjects: dict[tuple[str, str, str], Subject] = {}
    entries = {}
    for row in rows:
        model = Model(fingerprint=row.model, spec=row.model, label=labels.get(row.model, row.model))
        subject = Subject(model=model, scorer=row.scorer, defense=row.defense, name=row.who(labels))
        entries[subjects.setdefault(subject.key, subject), row.dataset, row.attack] = Entry(
            number=Number(top1=row.top1, low=row.ci_low, high=row.ci_high, n=row.n),
            protocol={} if row.is_worst else row.protocol,
            cut=Cut(row.cut_texts, row.cut_for_substitutes),
            partial=row.is_worst and not without_aim(members[row.attack]) <= without_aim(_members(row)),
        )
    return Section(
        shared=shared,
        subjects=list(subjects.values()),
        datasets=list(dict.fromkeys(row.dataset for row in rows)),
        attacks=list(attacks.values()),
        entries=entries,
    )


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


def search_grid(
    scores: "Mapping[str, Score]", front: Sequence[str], robust: str, by: Ranking = "mean", *, asha: bool = True
) -> Grid:
    """Return a table with a row per trial: those that ran longest first, then by accuracy.

    Args:
        front: the trials on the Pareto front.
        robust: the attacks behind the robust accuracy.
        by: the accuracy that trials are ranked by.
        asha: whether ASHA may have stopped some.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name].epoch, -scores[name].by(by)))
    rows = []
    for name in ranked:
        score = scores[name]
        cells = [number_cell(score.epoch), number_cell(score.clean, ".1f"), number_cell(score.robust, ".1f")]
        rows.append((name, [*cells, Cell(text="*" if name in front else "")]))
    return Grid(
        title="search: accuracy in % on the validation data",
        header=("trial", "epoch", "clean", "robust", "front"),
        rows=rows,
        notes=(
            f"Robust: {robust}",
            *(["ASHA stopped the trials that ended before the last epoch"] if asha else []),
            "*: no other trial that ran to its end is as good in both and better in one",
        ),
    )

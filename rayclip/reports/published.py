"""Compare our numbers with published ones: each CSV file in `published/` holds the numbers of one paper.

Columns: `paper, table, method, train_dataset, shots, attack, dataset, metric, value`, and `protocol`: the settings
behind the number, as `KEY=VALUE` pairs separated by blanks, with the keys that our results use. `model` is the
untouched model, `datasets` are those that an average is over. Settings that a paper does not state are left out and
not compared.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

from rayclip.data.registry import DATASETS
from rayclip.reports.formats import number_line
from rayclip.reports.grid import Cell, Grid, Part, accuracy, format_signed, number_cell
from rayclip.reports.model import Model
from rayclip.reports.notes import heading
from rayclip.reports.recalls import RecallTable, recalls_of
from rayclip.reports.section import Attack, Number, Section, Subject, average
from rayclip.types import UserError

_COLUMNS = "paper table method train_dataset shots attack dataset metric value".split()
_RECALL = re.compile(r"(tr|ir)_r@(\d+)")  # a metric
_NOT_OURS = ("datasets", "attack", "model")  # keys of a protocol that are compared separately


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number, in percent."""

    table: str
    method: str
    train_dataset: str
    shots: str
    attack: str
    dataset: str
    metric: str
    value: float
    protocol: Mapping[str, str]

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.protocol["datasets"].split("+")) if "datasets" in self.protocol else (self.dataset,)

    @property
    def recall(self) -> tuple[str, int] | None:
        """Direction and k of a recall; None for an accuracy."""
        found = _RECALL.fullmatch(self.metric)
        return (found[1], int(found[2])) if found else None


def papers() -> list[str]:
    """Return the names of the papers in `published/`."""
    folder = resources.files("rayclip.reports") / "published"
    return sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))


def read_paper(text: str, name: str) -> list[Published]:
    """Return the numbers in a paper's CSV.

    Raises:
        UserError: a column is missing, or a value is no number.
    """
    rows = csv.DictReader(io.StringIO(text))
    missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"published numbers '{name}' lack the column {missing[0]}: write {', '.join(_COLUMNS)}.")
    try:
        return [
            Published(
                **{k: row[k] for k in _COLUMNS[1:-1]},
                value=float(row["value"]),
                protocol=dict(pair.split("=", 1) for pair in (row.get("protocol") or "").split()),
            )
            for row in rows
        ]
    except ValueError as error:
        raise UserError(f"published numbers '{name}', line {rows.line_num}: {error}.") from None


def compare_with_published(
    sections: Sequence[Section], wanted: Sequence[str], tables: Sequence[RecallTable] = ()
) -> list[Part]:
    """Return a part of the report for each `PAPER:TABLE`, or for every table of `PAPER`.

    Args:
        sections: our accuracies.
        tables: our recalls.

    Raises:
        UserError: there is no such paper or table.
    """
    return [
        _part(sections, tables, paper, table, rows) for choice in wanted for paper, table, rows in _find_tables(choice)
    ]


def _find_tables(choice: str) -> Iterator[tuple[str, str, list[Published]]]:
    paper, _, table = choice.partition(":")
    if paper not in papers():
        raise UserError(f"--against '{choice}': there is no paper '{paper}', only {', '.join(papers())}.")
    file = resources.files("rayclip.reports") / "published" / f"{paper}.csv"
    rows = read_paper(file.read_text(encoding="utf-8"), paper)
    tables = list(dict.fromkeys(row.table for row in rows))
    if table and table not in tables:
        raise UserError(f"--against '{choice}': {paper} has no table {table}, only {', '.join(tables)}.")
    for name in [table] if table else tables:
        yield paper, name, [row for row in rows if row.table == name]


@dataclass(frozen=True, kw_only=True)
class _Match:
    subject: Subject
    attack: Attack
    ours: Number
    theirs: Published
    differs: tuple[str, ...]


def _part(
    sections: Sequence[Section], tables: Sequence[RecallTable], paper: str, table: str, rows: Sequence[Published]
) -> Part:
    found = [match for row in rows for match in _matches(sections, tables, row)]
    title = f"Beside {paper}, table {table}"
    if not found:
        ours = {d for section in sections for d in section.datasets} | {table.dataset for table in tables}
        return Part(title=title, text=(_why_nothing(ours, rows),))
    differences = list(dict.fromkeys(what for match in found for what in match.differs))
    alike = sum(not match.differs for match in found)
    measures = sorted({"recall" if match.theirs.recall else "accuracy" for match in found})
    grid = Grid(
        title=f"ours and those of {paper}, table {table}: {' and '.join(measures)} in %",
        header=("model", "data set", "attack", "ours", "theirs", "difference", "differs"),
        rows=[(match.subject.name, _cells(match, differences)) for match in found],
        notes=(
            f"The protocol matches in {alike} of {len(found)} numbers; there the difference is ours minus theirs",
            *(f"{i}: {what}" for i, what in enumerate(differences, 1)),
        ),
    )
    return Part(title=title, grids=(grid,), lines=[_line(match, f"{paper}:{table}") for match in found])


def _cells(match: _Match, differences: Sequence[str]) -> list[Cell]:
    recall = match.theirs.recall
    metric = f", {recall[0].upper()}@{recall[1]}" if recall else ""
    gap = match.ours.top1 - match.theirs.value
    return [
        Cell(text=match.theirs.dataset),
        Cell(text=f"{heading(match.attack.label)}{metric}"),
        accuracy(match.ours),
        number_cell(match.theirs.value, ".2f"),
        Cell() if match.differs else Cell(text=format_signed(gap), value=gap),
        Cell(text=" ".join(str(i) for i, what in enumerate(differences, 1) if what in match.differs)),
    ]


def _line(match: _Match, place: str) -> Mapping[str, Any]:
    """Return a comparison as a line of CSV."""
    ours, theirs = match.ours, match.theirs
    return {
        **number_line(match.subject, theirs.dataset, match.attack, ours, theirs.metric if theirs.recall else ""),
        "beside": place,
        "theirs": theirs.value,
        "difference": "" if match.differs else f"{ours.top1 - theirs.value:.4f}",
        "differs": "; ".join(match.differs),
    }


def _matches(sections: Sequence[Section], tables: Sequence[RecallTable], row: Published) -> Iterator[_Match]:
    """Yield, for each model that the row is about, the number with the fewest differences from the paper's protocol."""
    found: dict[Any, list[_Match]] = {}
    candidates = [((i, own[0].key), own) for i, section in enumerate(sections) for own in _accuracies(section, row)]
    candidates += [((-1, own[0].key), own) for table in tables for own in _recalls(table, row)]
    for key, (subject, attack, ours, protocol, sizes) in candidates:
        if _is_about(row, subject.model) and _same_kind(row, attack):
            differs = _differences(row, subject.model, protocol, sizes)
            match = _Match(subject=subject, attack=attack, ours=ours, theirs=row, differs=differs)
            found.setdefault(key, []).append(match)
    for of_one_model in found.values():
        yield min(of_one_model, key=lambda match: len(match.differs))


# A model, an attack, our number, its protocol, and the images behind it by data set
_Candidate = tuple[Subject, Attack, Number, Mapping[str, Any], list[tuple[str, int]]]


def _accuracies(section: Section, row: Published) -> Iterator[_Candidate]:
    by_name = {plain_dataset(d): d for d in section.datasets}
    if row.metric != "top1" or not all(d in by_name for d in row.datasets):
        return
    for subject in section.subjects:
        for attack in section.attacks:
            entries = [section.get(subject, by_name[d], attack) for d in row.datasets]
            numbers = [entry.number for entry in entries if entry is not None]
            if (
                (subject.scorer, subject.defense) == ("template", "none")
                and entries[0]
                and len(numbers) == len(entries)
            ):
                ours = average(numbers) if "datasets" in row.protocol else numbers[0]
                protocol = {**section.shared, **attack.settings, **entries[0].protocol}
                yield subject, attack, ours, protocol, [*zip(row.datasets, (x.n for x in numbers), strict=True)]


def _recalls(table: RecallTable, row: Published) -> Iterator[_Candidate]:
    if row.recall and plain_dataset(table.dataset).removesuffix("_captions") == row.dataset:
        settings = table.attack.settings
        for subject, pairs in table.rows:
            number = recalls_of(pairs).get(row.recall)
            if number is not None:
                yield subject, table.attack, number, settings, [(row.dataset, settings["images"])]


def _is_about(row: Published, model: Model) -> bool:
    if model.is_mix:
        return False
    if model.method is None:
        return row.train_dataset == "none" and model.lineage is None
    shots = "full" if model.shots is None else str(model.shots)
    trained_on = plain_dataset(model.trained_on or "")
    return (_letters(row.method), row.shots, row.train_dataset) == (_letters(_method(model)), shots, trained_on)


def _method(model: Model) -> str:
    """Return the method's name as papers write it: an ablation of MMCoA's losses is not MMCoA."""
    settings = model.config.get("method") or {}
    if settings.get("lambda_txt") == 0:
        return f"{model.method} (image loss only)"
    return f"{model.method} (text loss only)" if settings.get("lambda_img") == 0 else str(model.method)


def _same_kind(row: Published, attack: Attack) -> bool:
    wanted = row.protocol.get("attack")
    return attack.settings["attack"] == wanted if wanted else attack.kind == row.attack


def _differences(
    row: Published, model: Model, ours: Mapping[str, Any], sizes: Iterable[tuple[str, int]]
) -> tuple[str, ...]:
    """Return what differs from the published protocol; `sizes` are the images behind our number, by data set."""
    found = []
    base = str(model.config.get("model") or model.spec)
    if "model" in row.protocol and base != row.protocol["model"]:
        found.append(f"model {PurePosixPath(base).name if '/' in base else base}, theirs {row.protocol['model']}")
    for key, theirs in row.protocol.items():
        if key not in _NOT_OURS and str(ours.get(key, "none")) != theirs:
            found.append(f"{key.replace('_', ' ')} {ours.get(key, 'none')}, theirs {theirs}")
    for name, images in sizes:
        size = _evaluated(name) or _evaluated(f"{name}_captions")
        if size is not None and images != size:
            found.append(f"{images:,} of the {size:,} images of {name}")
    return tuple(found)


def _evaluated(dataset: str) -> int | None:
    """Return the number of images that the papers evaluate of a data set; None if the data set is unknown."""
    known = DATASETS.get(dataset)
    return None if known is None else known.splits.get(known.evaluated)


def _why_nothing(ours: set[str], rows: Sequence[Published]) -> str:
    theirs = sorted({d for row in rows for d in row.datasets})
    if not {plain_dataset(d).removesuffix("_captions") for d in ours} & set(theirs):
        about = ", ".join(sorted(ours))
        return f"Nothing to compare: the table is about {', '.join(theirs)}, these results about {about}."
    kinds = sorted({f"{r.method} ({r.train_dataset}, {r.shots})" for r in rows if r.train_dataset != "none"})
    return (
        f"Nothing to compare: no model here is one of the table's. It has the untouched model and {', '.join(kinds)}."
    )


def plain_dataset(name: str) -> str:
    """Return a data set's name without file ending, split or part: `cifar10-test` becomes `cifar10`."""
    stem = PurePosixPath(name.partition("#")[0]).name.removesuffix(".parquet")
    return re.sub(r"[-_](train|test|val|validation)$", "", stem)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())

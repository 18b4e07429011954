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

from rayclip.data.registry import find
from rayclip.reports.grid import Cell, Grid, Part, accuracy, format_signed
from rayclip.reports.model import Model
from rayclip.reports.notes import heading
from rayclip.reports.recalls import RecallTable, recalls_of
from rayclip.reports.section import Attack, Number, Section, Subject, average
from rayclip.reports.to_csv import number_line
from rayclip.types import UserError

_COLUMNS = "paper table method train_dataset shots attack dataset metric value".split()
_RECALL = re.compile(r"(?P<direction>tr|ir)_r@(?P<k>\d+)")  # a metric
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
    found = [match for row in rows for section in sections for match in _match_accuracies(section, row)]
    found += [match for row in rows for match in _match_recalls(tables, row)]
    title = f"Beside {paper}, table {table}"
    if not found:
        ours = {d for section in sections for d in section.datasets} | {table.dataset for table in tables}
        return Part(title=title, text=(_why_nothing(ours, rows),))
    differences = list(dict.fromkeys(what for match in found for what in match.differs))
    alike = sum(not match.differs for match in found)
    grid = Grid(
        title=f"ours and those of {paper}, table {table}: {_measure(found)} in %",
        header=("model", "data set", "attack", "ours", "theirs", "difference", "differs"),
        rows=[(match.subject.name, _cells(match, differences)) for match in found],
        notes=(
            f"The protocol matches in {alike} of {len(found)} numbers; there the difference is ours minus theirs",
            *(f"{i}: {what}" for i, what in enumerate(differences, 1)),
        ),
    )
    return Part(title=title, grids=(grid,), lines=[_line(match, f"{paper}:{table}") for match in found])


def _cells(match: _Match, differences: Sequence[str]) -> list[Cell]:
    where = _RECALL.fullmatch(match.theirs.metric)
    metric = f", {where['direction'].upper()}@{where['k']}" if where else ""
    gap = match.ours.top1 - match.theirs.value
    return [
        Cell(text=match.theirs.dataset),
        Cell(text=f"{heading(match.attack.label)}{metric}"),
        accuracy(match.ours),
        Cell(text=f"{match.theirs.value:.2f}", value=match.theirs.value),
        Cell() if match.differs else Cell(text=format_signed(gap), value=gap),
        Cell(text=" ".join(str(i) for i, what in enumerate(differences, 1) if what in match.differs)),
    ]


def _line(match: _Match, place: str) -> Mapping[str, Any]:
    """Return a comparison as a line of CSV."""
    ours, theirs = match.ours, match.theirs
    recalled = theirs.metric if _RECALL.fullmatch(theirs.metric) else ""
    return {
        **number_line(match.subject, theirs.dataset, match.attack, ours, recalled),
        "beside": place,
        "theirs": theirs.value,
        "difference": "" if match.differs else f"{ours.top1 - theirs.value:.4f}",
        "differs": "; ".join(match.differs),
    }


def _measure(found: Sequence[_Match]) -> str:
    kinds = {"recall" if _RECALL.fullmatch(m.theirs.metric) else "accuracy" for m in found}
    return " and ".join(sorted(kinds))


def _match_accuracies(section: Section, row: Published) -> Iterator[_Match]:
    """Yield, for each model that matches the row, its attack with the fewest differences from the paper's."""
    if row.metric != "top1":
        return
    by_name = {plain_dataset(d): d for d in section.datasets}
    if not all(d in by_name for d in row.datasets):
        return
    for subject in section.subjects:
        if subject.defense != "none" or subject.scorer != "template" or not _is_about(row, subject.model):
            continue
        candidates = []
        for attack in section.attacks:
            if not _same_kind(row, attack):
                continue
            numbers = [section.number(subject, by_name[d], attack) for d in row.datasets]
            present = [number for number in numbers if number is not None]
            if len(present) == len(numbers):
                ours = present[0] if len(present) == 1 and "datasets" not in row.protocol else average(present)
                entry = section.get(subject, by_name[row.datasets[0]], attack)
                protocol = {**section.shared, **attack.settings, **(entry.protocol if entry else {})}
                sizes = zip(row.datasets, [number.n for number in present], strict=True)
                differs = _differences(row, subject.model, protocol, sizes)
                candidates.append(_Match(subject=subject, attack=attack, ours=ours, theirs=row, differs=differs))
        yield from _with_fewest_differences(candidates)


def _match_recalls(tables: Sequence[RecallTable], row: Published) -> Iterator[_Match]:
    """Yield, for each model that matches the row, its recall with the fewest differences from the paper's protocol."""
    where = _RECALL.fullmatch(row.metric)
    if where is None:
        return
    candidates: dict[str, list[_Match]] = {}
    for table in tables:
        if plain_dataset(table.dataset).removesuffix("_captions") != row.dataset or not _same_kind(row, table.attack):
            continue
        protocol = table.attack.settings
        for subject, pairs in table.rows:
            number = recalls_of(pairs).get((where["direction"], int(where["k"])))
            if number is not None and _is_about(row, subject.model):
                differs = _differences(row, subject.model, protocol, [(row.dataset, protocol["images"])])
                match = _Match(subject=subject, attack=table.attack, ours=number, theirs=row, differs=differs)
                candidates.setdefault(subject.model.fingerprint, []).append(match)
    for of_one_model in candidates.values():
        yield from _with_fewest_differences(of_one_model)


def _with_fewest_differences(candidates: Sequence[_Match]) -> Sequence[_Match]:
    return [min(candidates, key=lambda match: len(match.differs))] if candidates else []


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
    try:
        known = find(dataset)
    except UserError:
        return None
    return known.splits.get(known.evaluated)


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

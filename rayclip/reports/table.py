"""Result tables as in the papers: one table per data set, a row per model, a column per attack."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from rayclip import terminal
from rayclip.types import WORST, Cut, Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Settings of an attack that are listed below a table; others are in its label, and all are in the result files
SHOWN = (
    "parts iterations restarts targets queries steps step norm start stop substitutes k changes offset objective sets "
    "captions source scales noise"
).split()

_NAMES = 28  # width of the row names in a table that has to be split anyway


@dataclass(frozen=True)
class Table:
    """A table of formatted cells with a caption that states the protocol."""

    title: str
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    caption: str

    def markdown(self) -> str:
        head = [f"**{as_markdown(self.title)}**", "", _line(map(as_markdown, self.header))]
        rule = _line(["---"] + ["---:"] * (len(self.header) - 1))
        body = [_line(map(as_markdown, row)) for row in self.body]
        return "\n".join([*head, rule, *body, "", as_markdown(self.caption), ""])

    def rich(self, width: int = 80) -> Group:
        """Render for a terminal of `width` characters; columns that do not fit follow below, with row names again."""
        first = max(max((len(word) for word in row[0].split()), default=0) for row in (self.header, *self.body))
        names = min(first, width // 2)
        widths = [max(len(text) for text in (*_stacked(h).split("\n"), *cells)) for h, *cells in self._columns()[1:]]
        tight = names + sum(2 + w for w in widths) > width  # prefer narrow gaps to broken names
        if names + sum(1 + w for w in widths) > width:
            names = max(names, min(_NAMES, max(len(row[0]) for row in (self.header, *self.body))))
        blocks: list[list[int]] = [[]]
        for i, w in enumerate(widths, 1):
            if blocks[-1] and names + 1 + w + sum(1 + widths[j - 1] for j in blocks[-1]) > width:
                blocks.append([])
            blocks[-1].append(i)
        parts: list[RichTable | Text] = []
        for block in blocks:  # `Text` titles: a rich table's own would be as narrow as the table
            parts += [Text("(continued)" if parts else self.title, "table.title"), self._block(block, tight=tight)]
        return Group(*parts, Text(self.caption, "table.caption"))

    def _columns(self) -> list[tuple[str, ...]]:
        return list(zip(self.header, *self.body, strict=True))

    def _block(self, chosen: Sequence[int], *, tight: bool) -> RichTable:
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0 if tight else 1), show_edge=False, pad_edge=False)
        for i in (0, *chosen):
            table.add_column(
                Text(_stacked(self.header[i]) if i else self.header[0]),
                justify="right" if i else "left",
                no_wrap=bool(i),
                overflow="fold",
            )
        for row in self.body:
            if any(row[i] for i in chosen):
                table.add_row(*(Text(row[i]) for i in (0, *chosen)))  # `Text`: names may hold brackets
        return table


def _stacked(name: str) -> str:
    """Put the budget below the attack's name, so that five columns fit into 80 characters."""
    return "\n".join(name.rsplit(" ", 1))


def as_markdown(text: str) -> str:
    """Escape a text for GitHub's Markdown, so that bars, brackets, stars and tags in names are shown as they are."""
    text = re.sub(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(text.splitlines()))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def result_tables(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[Table]:
    """Return one table per data set, and one with the average if there are several data sets.

    Args:
        labels: display names of models, by the name in the rows; models that are missing keep the rows' name.
    """
    tables = [_table(name, [r for r in rows if r.dataset == name], labels or {}) for name in _distinct(rows, "dataset")]
    return tables if len(tables) == 1 else [*tables, _average(rows, labels or {})]


def _distinct(rows: Sequence[Row], field: str) -> list[str]:
    """Return the distinct values in order of appearance, worst cases last."""
    worst = {row.attack for row in rows if row.is_worst}
    return sorted(dict.fromkeys(getattr(row, field) for row in rows), key=lambda value: value in worst)


def _table(dataset: str, rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    attacks = _distinct(rows, "attack")
    found = {(row.who(labels), row.attack): row for row in rows}
    body = tuple(
        (who, *(_number(found.get((who, attack))) for attack in attacks))
        for who in dict.fromkeys(row.who(labels) for row in rows)
    )
    sizes = sorted({row.n for row in rows})
    title = f"{dataset}: accuracy in %, n = {', '.join(map(str, sizes))}, 95 % Wilson intervals"
    return Table(title, ("model", *map(heading, attacks)), body, _protocol(rows, labels))


def _average(rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    """Return the table of averages as in the papers: every data set has the same weight."""
    attacks, datasets = _distinct(rows, "attack"), _distinct(rows, "dataset")
    body = []
    for who in dict.fromkeys(row.who(labels) for row in rows):
        cells = []
        for attack in attacks:
            values = [r.top1 for r in rows if r.who(labels) == who and r.attack == attack]
            cells.append(f"{sum(values) / len(values):.1f}" if len(values) == len(datasets) else "")
        body.append((who, *cells))
    return Table(
        f"average over {len(datasets)} data sets: accuracy in %",
        ("model", *map(heading, attacks)),
        tuple(body),
        ". ".join(["Every data set weighs the same", *_differences(rows)]) + ".",
    )


def show_rows(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> None:
    """Print the tables to standard output."""
    console = terminal.console()
    for table in result_tables(rows, labels):
        console.print(table.rich(console.width))


def rows_json(rows: "Sequence[DataclassInstance]") -> str:
    """Return rows of results or recalls in the JSON form of `--json` and `results.json`."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the listed settings of an attack that differ between data sets, such as its parts on few classes."""
    for attack in _distinct([row for row in rows if not row.is_worst], "attack"):
        protocols = {row.dataset: row.protocol for row in rows if row.attack == attack and row.defense == "none"}
        for key, value in across(protocols).items():
            if key in SHOWN and isinstance(value, Varying):
                yield f"{heading(attack)}: {key} {value}"


class Varying(dict[str, Any]):
    """A setting that differs between data sets: its value by data set."""

    def __str__(self) -> str:
        """Format as `apgd-ce on pcam; apgd-ce, apgd-dlr on cifar10, stl10`."""
        sharing: dict[str, list[str]] = {}
        for dataset, value in self.items():
            sharing.setdefault(str(value), []).append(dataset)
        return "; ".join(f"{value} on {', '.join(datasets)}" for value, datasets in sharing.items())


def across(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge one attack's protocols on several data sets: settings that differ become `Varying`."""
    keys = dict.fromkeys(key for protocol in protocols.values() for key in protocol)
    found: dict[str, Any] = {}
    for key in keys:
        values = {dataset: protocol[key] for dataset, protocol in protocols.items() if key in protocol}
        first = next(iter(values.values()))
        alike = len(values) == len(protocols) and all(value == first for value in values.values())
        found[key] = first if alike else Varying(values)
    return found


def heading(attack: str) -> str:
    """Return an attack's label as a column header.

    `pgd-10_eps4_bpda` -> `pgd-10 bpda 4/255`; `pgd-10_eps4 stop final` -> `pgd-10 stop final 4/255`; `worst_eps4` ->
    `worst case 4/255`.
    """
    label, _, settings = attack.partition(" ")
    name, separator, rest = label.partition("_eps")
    if name in (WORST, f"{WORST}_l2"):
        name = name.replace(WORST, f"{WORST} case")
    eps, _, aim = rest.partition("_")
    shown = (name.replace("_", " "), aim, settings, f"{eps}/255") if separator else (name, settings)
    return " ".join(filter(None, shown))


def cut_notes(found: Iterable[tuple[str, Cut]]) -> list[str]:
    """Return notes about truncated texts: how many, separately for each owner if the numbers differ.

    Args:
        found: owners, such as models, and counts; of several counts of one owner the largest is reported.
    """
    counts: dict[str, Cut] = {}
    for owner, cut in found:
        before = counts.get(owner, Cut())
        counts[owner] = Cut(max(cut.texts, before.texts), max(cut.substitutes, before.substitutes))
    notes = []
    for which, what in (
        ("texts", "cut at the context length of the text encoder"),
        ("substitutes", "not read to the end by the masked language model"),
    ):
        each = {owner: getattr(cut, which) for owner, cut in counts.items()}
        if len(set(each.values())) > 1:
            notes.append(f"texts {what}: " + ", ".join(f"{owner} {count}" for owner, count in each.items() if count))
        elif any(each.values()):
            count = next(iter(each.values()))
            notes.append(f"{count:,} {'text is' if count == 1 else 'texts are'} {what}")
    return notes


def resolution_note(protocol: Mapping[str, Any]) -> str:
    """Return `model resolution`, or, for example, `native resolution (plain resize)`."""
    note = f"{protocol['resolution']} resolution"
    return f"{note} ({protocol.get('resize') or 'antialias'} resize)" if protocol["resolution"] == "native" else note


def in_one_breath(described: Iterable[tuple[str, str]]) -> list[str]:
    """Group names with equal settings: `NAME, NAME: SETTINGS`."""
    sharing: dict[str, list[str]] = {}
    for name, settings in described:
        sharing.setdefault(settings, []).append(name)
    return [f"{', '.join(names)}: {settings}" for settings, names in sharing.items()]


def _number(row: Row | None) -> str:
    if row is None:
        return ""
    top1 = "100" if row.top1 == 100 else f"{row.top1:.1f}"  # without decimals, so that five columns fit into 80
    return f"{top1} {row.ci_low:.0f}–{row.ci_high:.0f}"


def _protocol(rows: Sequence[Row], labels: Mapping[str, str]) -> str:
    """Return the caption: the settings that all numbers of the table share, then those of each attack."""
    notes = []
    first = next(row.protocol for row in rows if not row.is_worst)
    described: dict[str, dict[bool, str]] = {}
    defenses: dict[str, str] = {}
    for row in (row for row in rows if not row.is_worst):
        kept = ", ".join(f"{k} {v}" for k, v in row.protocol.items() if k in SHOWN)
        described.setdefault(row.attack, {}).setdefault(row.defense != "none", kept)
        if row.defense != "none":
            defenses[row.defense] = str(row.protocol["defense"])
    notes += in_one_breath(
        (heading(a), kinds[False] + f"; on defended models {kinds[True]}" if len(set(kinds.values())) > 1 else kept)
        for a, kinds in described.items()
        if (kept := next(iter(kinds.values())))
    )
    if defenses:
        notes += [f"{label}: {whole}" for label, whole in defenses.items() if whole != label]
        notes.append("attacks ignore the defence unless a column says how they go through it")
        draws = max(row.protocol.get("draws", 1) for row in rows)
        notes += [f"through a random defence each query averages {draws} draws"] if draws > 1 else []
    shared = (
        f"prompt '{first['template']}', {first.get('class_names', 'curated')} class names, "
        f"{resolution_note(first)}, {first['precision']}, seed {first['seed']}"
    )
    worst = {row.attack for row in rows if row.is_worst}
    if worst:
        which = "every attack" if len(worst) == 1 else "every attack within its budget"
        notes.append(f"worst case: right under {which}, per sample")
    notes += cut_notes((row.who(labels), Cut(row.cut_texts, row.cut_for_substitutes)) for row in rows)
    return ". ".join([*notes, shared]) + "."

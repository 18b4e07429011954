"""Result tables in the papers' shape: a row a model, a column an attack, one table a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable

from rayclip.types import Row

# Of an attack's settings, those that the line below a table names; labels say the rest, the results all
SHOWN = (
    "parts iterations restarts targets queries steps step norm start stop substitutes k changes offset objective sets "
    "captions source scales noise"
).split()

_WIDTH = 80  # of a terminal


@dataclass(frozen=True)
class Table:
    """Rendered cells with a caption that states the protocol."""

    title: str
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    caption: str

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.header), _line(["---"] + ["---:"] * (len(self.header) - 1))]
        return "\n".join([*lines, *map(_line, self.body), "", self.caption, ""])

    def rich(self) -> RichTable:
        columns = list(zip(self.header, *self.body, strict=True))
        first = max(len(word) for cell in columns[0] for word in cell.split())
        wide = first + sum(2 + max(map(len, cells), default=0) for _, *cells in columns[1:]) > _WIDTH
        table = RichTable(
            title=self.title,
            caption=self.caption,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 0, 0, 0 if wide else 1),  # rather close together than names broken in their middle
            show_edge=False,
            pad_edge=False,
        )
        for i, name in enumerate(self.header):
            name = (
                "\n".join(name.rsplit(" ", 1)) if i else name
            )  # the budget below the attack's name: 80 columns hold 5
            table.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
        for row in self.body:
            table.add_row(*row)
        return table


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def result_tables(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[Table]:
    """One table a data set, and an average over data sets where there are several.

    Args:
        labels: names to show for models, by the name in the rows; the rows' own where absent.
    """
    tables = [_table(name, [r for r in rows if r.dataset == name], labels or {}) for name in _distinct(rows, "dataset")]
    return tables if len(tables) == 1 else [*tables, _average(rows, labels or {})]


def _distinct(rows: Sequence[Row], field: str) -> list[str]:
    """The values in the order of their first rows, `worst` last."""
    return sorted(dict.fromkeys(getattr(row, field) for row in rows), key=lambda value: value == "worst")


def _table(dataset: str, rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    attacks = _distinct(rows, "attack")
    found = {(row.who(labels), row.attack): row for row in rows}
    body = tuple(
        (who, *(_number(found.get((who, attack))) for attack in attacks))
        for who in dict.fromkeys(row.who(labels) for row in rows)
    )
    sizes = sorted({row.n for row in rows})
    title = f"{dataset}: accuracy in %, n = {', '.join(map(str, sizes))}, 95 % Wilson intervals"
    return Table(title, ("model", *map(heading, attacks)), body, _protocol(rows))


def _average(rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    """The papers' average: every data set weighs the same."""
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
        "Every data set weighs the same.",
    )


def heading(attack: str) -> str:
    """`pgd-10_eps4` -> `pgd-10 4/255`; `pgd-10_eps4_bpda` -> `pgd-10 bpda 4/255`."""
    name, separator, rest = attack.partition("_eps")
    eps, _, aim = rest.partition("_")
    return " ".join(filter(None, (name.replace("_", " "), aim, f"{eps}/255"))) if separator else name


def _number(row: Row | None) -> str:
    if row is None:
        return ""
    top1 = "100" if row.top1 == 100 else f"{row.top1:.1f}"  # the shorter form keeps five columns within 80
    return f"{top1} {row.ci_low:.0f}–{row.ci_high:.0f}"


def _protocol(rows: Sequence[Row]) -> str:
    """What every number of the table shares, and what belongs to one attack."""
    notes = []
    first = next(row.protocol for row in rows if row.attack != "worst")
    described: dict[str, dict[bool, str]] = {}
    defenses: dict[str, str] = {}
    for row in (row for row in rows if row.attack != "worst"):
        kept = ", ".join(f"{k} {v}" for k, v in row.protocol.items() if k in SHOWN)
        described.setdefault(row.attack, {}).setdefault(row.defense != "none", kept)
        if row.defense != "none":
            defenses[row.defense] = str(row.protocol["defense"])
    for attack, kinds in described.items():
        if len(set(kinds.values())) == 1:
            (kept,) = set(kinds.values())
            notes += [f"{heading(attack)}: {kept}"] if kept else []
        else:
            notes.append(f"{heading(attack)}: {kinds[False]}; on defended models {kinds[True]}")
    if defenses:
        notes += [f"{label}: {whole}" for label, whole in defenses.items() if whole != label]
        notes.append("attacks ignore the defence unless a column says how they go through it")
        draws = max(row.protocol.get("draws", 1) for row in rows)
        notes += [f"through a random defence each query averages {draws} draws"] if draws > 1 else []
    shared = (
        f"prompt '{first['template']}', {first.get('class_names', 'curated')} class names, "
        f"{first['resolution']} resolution, {first['precision']}, seed {first['seed']}"
    )
    if any(row.attack == "worst" for row in rows):
        notes.append("worst: right under every attack, per sample")
    return ". ".join([*notes, shared]) + "."

"""Published numbers: each CSV file in `published/` holds those of one paper; `sources.toml` says where they are from.

Columns: `paper, table, method, train_dataset, shots, attack, dataset, metric, value`; `protocol`: the settings behind
the number, as `KEY=VALUE` pairs separated by blanks; and `doubt`, why a number may be wrong, empty for most. Keys are
those that our results use, and: `model`, the untouched model; `datasets`, those that an average is over; `images`, how
many of each were evaluated; `defense` with `defense_steps` and `defense_step`; `train_eps`, the training budget.
Settings that a paper does not state are left out and not compared.
"""

import csv
import io
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from rayclip.types import UserError

_COLUMNS = "paper table method train_dataset shots attack dataset metric value".split()
_RECALL = re.compile(r"(tr|ir)_r@(\d+)")  # a metric


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number, in percent."""

    paper: str
    table: str
    method: str
    train_dataset: str
    shots: str
    attack: str
    dataset: str
    metric: str
    value: float
    protocol: Mapping[str, str]
    doubt: str = ""

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.protocol["datasets"].split("+")) if "datasets" in self.protocol else (self.dataset,)

    @property
    def defense(self) -> str:
        return self.protocol.get("defense", "none")

    @property
    def field_protocol(self) -> str:
        """The field's protocol that the paper is of; empty if of none."""
        return sources().get(self.paper, {}).get("protocol", "")

    @property
    def link(self) -> str:
        """Address of the paper, if it is on arXiv; else empty."""
        found = re.search(r"arXiv (\d{4}\.\d{5})", sources().get(self.paper, {}).get("source", ""))
        return f"https://arxiv.org/abs/{found[1]}" if found else ""

    @property
    def place(self) -> str:
        """Paper and table, as `--against` names them."""
        return f"{self.paper}:{self.table}"

    @property
    def who(self) -> str:
        """The model that it is of, in words."""
        trained = "" if self.train_dataset == "none" else f" on {self.train_dataset}"
        shots = f", {self.shots} shots" if self.shots not in ("none", "full") else ""
        eps = f" at {self.protocol['train_eps']}" if "train_eps" in self.protocol else ""
        model = f", {self.protocol['model']}" if "model" in self.protocol else ""
        settings = {key: self.protocol.get(f"defense_{key}") for key in ("steps", "step")}
        defended = "".join(f" {key} {value}" for key, value in settings.items() if value)
        return f"{self.method}{trained}{eps}{defended}{shots}{model}"

    @property
    def under(self) -> str:
        """The attack in words: `pgd steps 10 1/255`."""
        iterations = [f"{key} {self.protocol[key]}" for key in ("steps", "iterations") if key in self.protocol]
        words = [self.protocol.get("attack", self.attack), *iterations, self.protocol.get("eps", "")]
        return " ".join(filter(None, words))

    @property
    def recall(self) -> tuple[str, int] | None:
        """Direction and k of a recall; None for an accuracy."""
        found = _RECALL.fullmatch(self.metric)
        return (found[1], int(found[2])) if found else None


def papers() -> list[str]:
    """Return the names of the papers in `published/`."""
    folder = resources.files("rayclip.reports") / "published"
    return sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))


@cache
def sources() -> Mapping[str, Mapping[str, str]]:
    """Return by paper the `source` of its numbers, what the file `has` of it, and the field's `protocol` that it is
    of, if it is of one."""
    return tomllib.loads((resources.files("rayclip.reports") / "published" / "sources.toml").read_text("utf-8"))


@cache
def numbers_of(paper: str) -> tuple[Published, ...]:
    """Return the numbers of one of the `papers`."""
    file = resources.files("rayclip.reports") / "published" / f"{paper}.csv"
    return tuple(read_paper(file.read_text(encoding="utf-8"), paper))


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
                paper=name,
                value=float(row["value"]),
                protocol=dict(pair.split("=", 1) for pair in (row.get("protocol") or "").split()),
                doubt=row.get("doubt") or "",
            )
            for row in rows
        ]
    except ValueError as error:
        raise UserError(f"published numbers '{name}', line {rows.line_num}: {error}.") from None


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())

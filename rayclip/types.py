"""Small types that every room shares. Imports nothing of ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

WORST = "worst"  # the worst case over several attacks, where an attack is named

# `user:password@` ahead of a host, and the options of an address that open a door
_PASSWORD = re.compile(r"(?<=://)([^\s/?#@:]*):[^\s/?#]*@")
_KEY = re.compile(
    r"(?i)(?<=[?&])((?:[\w.%-]*(?:access_?key|secret|token|passw|credential|signature|api_?key)[\w.%-]*|sig|key)=)"
    r"[^\s&#]*?(?=[\"'.,;:)]*(?:[\s&#]|$))"
)


def redacted(text: str) -> str:
    """A text with the secrets of the addresses in it taken out: passwords, keys and tokens."""
    return _KEY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def has_secret(address: str) -> bool:
    """Whether an address holds a password or a key; a user's name alone is none."""
    return redacted(address) != address


class UserError(Exception):
    """Something the user can mend: one clear sentence that says what to do. The command line exits with 2.

    Secrets of the addresses in the sentence are left out.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(redacted(sentence))


def check_same(what: str, spec: str, found: str, planned: str) -> None:
    """Raise a `UserError` if the files behind `spec` have another fingerprint than the one that was planned with."""
    if found != planned:
        raise UserError(
            f"{what} '{spec}' is not what it was when the work was planned: every node must see the same files, and "
            "they must not change meanwhile."
        )


class Cut(NamedTuple):
    """How many texts a number stands on that were not read to their end.

    Attributes:
        texts: cut at the context length of the text encoder.
        substitutes: read by the masked language model, which BERT-Attack asks for substitutes, up to its `max_length`
            only.
    """

    texts: int = 0
    substitutes: int = 0

    def recorded(self) -> dict[str, int]:
        """As result files hold it."""
        return {"cut_texts": self.texts, "cut_for_substitutes": self.substitutes}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Cut":
        return cls(*(int(record.get(name, 0)) for name in cls().recorded()))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of a result table together with the protocol it stands on. Accuracies are percents."""

    model: str
    dataset: str
    attack: str
    eps: float | None
    steps: int | None
    n: int
    top1: float
    ci_low: float
    ci_high: float
    protocol: Mapping[str, Any]
    cell: str
    defense: str = "none"
    scorer: str = "template"
    cut_texts: int = 0
    cut_for_substitutes: int = 0

    @property
    def is_worst(self) -> bool:
        """Whether this is the worst case over several attacks."""
        return "worst_of" in self.protocol

    def who(self, labels: Mapping[str, str] | None = None) -> str:
        """The model, under its label if it has one, with its scorer and its defence."""
        name = (labels or {}).get(self.model, self.model)
        if self.scorer != "template":
            name = f"{name}, {self.scorer}"
        return name if self.defense == "none" else f"{name} + {self.defense}"


class Tracker(Protocol):
    """Where the driver logs runs. `tracking.SpooledTracker` is the real one."""

    @property
    def address(self) -> str:
        """Store and experiment: equal for trackers whose runs are the same."""

    def exists(self, run: str) -> bool:
        """Whether a run was started, and is still there to be continued."""

    def start(
        self,
        run: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Open a run, once; `run` and `parent` are keys of the caller's choice, by which it is called from now on."""

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """Log (name, value, step) triples."""

    def describe(self, run: str, text: str, *, study: bool = False) -> None:
        """Say in Markdown what a run found, or what the study is to which it belongs."""

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Store a file, or a folder with all it holds."""

    def image(self, run: str, key: str, png: bytes) -> None:
        """Store a picture for the UI's gallery."""

    def data(self, run: str, name: str, digest: str, context: str, about: Mapping[str, Any]) -> None:
        """Note a data set that a run has used, for what (`context`), and plain facts about it."""

    def checkpoint(self, run: str, path: Path, folder: str, about: Mapping[str, Any]) -> None:
        """Store a checkpoint's files and register it as a model that can be loaded and served.

        Args:
            folder: of the run's artifacts.
            about: `class_names`, `template`, `description`, and `tags` of the registered version.
        """

    def rank(self, run: str, protocol: str, accuracies: Mapping[str, float]) -> None:
        """Note worst-case accuracies (percent) of registered checkpoints, by the fingerprint of their weights, that a
        run measured by one protocol."""

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as a table that the UI shows."""

    def finish(self, run: str, *, failed: bool = False) -> None:
        """Close a run."""

    def deliver(self) -> int:
        """Send what waits (also what workers have left) if the tracker answers; how many entries are left."""

    def close(self) -> int:
        """The same with some patience, at the end of a command."""

"""Small types shared by the whole package. Imports no other module of the package."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

WORST = "worst"  # stands in place of an attack's name for the worst case over several attacks

# `user:password@` before a host, and the query options of an address that carry credentials
_PASSWORD = re.compile(r"(?<=://)([^\s/?#@:]*):[^\s/?#]*@")
_KEY = re.compile(
    r"(?i)(?<=[?&])((?:[\w.%-]*(?:access_?key|secret|token|passw|credential|signature|api_?key)[\w.%-]*|sig|key)=)"
    r"[^\s&#]*?(?=[\"'.,;:)]*(?:[\s&#]|$))"
)


def redacted(text: str) -> str:
    """Return the text with passwords, keys and tokens removed from the addresses in it."""
    return _KEY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def has_secret(address: str) -> bool:
    """Return whether an address holds a password or a key; a user name alone is not a secret."""
    return redacted(address) != address


class UserError(Exception):
    """An error the user can fix; its message is one clear sentence that says what to do. The command line exits with 2.

    Secrets in addresses within the message are removed.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(redacted(sentence))


def check_same(what: str, spec: str, found: str, planned: str) -> None:
    """Raise a `UserError` if the fingerprint of the files behind `spec` differs from the one used in planning."""
    if found != planned:
        raise UserError(
            f"{what} '{spec}' is not what it was when the work was planned: every node must see the same files, and "
            "they must not change meanwhile."
        )


class Cut(NamedTuple):
    """Counts of the truncated texts behind a number.

    Attributes:
        texts: truncated at the context length of the text encoder.
        substitutes: truncated at the `max_length` of the masked language model that proposes BERT-Attack's
            substitutes.
    """

    texts: int = 0
    substitutes: int = 0

    def recorded(self) -> dict[str, int]:
        """Return the counts as result files store them."""
        return {"cut_texts": self.texts, "cut_for_substitutes": self.substitutes}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Cut":
        return cls(*(int(record.get(name, 0)) for name in cls().recorded()))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of a result table together with its protocol. Accuracies are in percent."""

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
        """Return whether this is the worst case over several attacks."""
        return "worst_of" in self.protocol

    def who(self, labels: Mapping[str, str] | None = None) -> str:
        """Return the model's label (or name, if it has none) with its scorer and its defence."""
        name = (labels or {}).get(self.model, self.model)
        if self.scorer != "template":
            name = f"{name}, {self.scorer}"
        return name if self.defense == "none" else f"{name} + {self.defense}"


class Tracker(Protocol):
    """Interface through which the driver logs runs; implemented by `tracking.SpooledTracker`."""

    @property
    def address(self) -> str:
        """The store and the experiment; two trackers with the same address see the same runs."""

    def exists(self, run: str) -> bool:
        """Return whether a run was started and still exists, so that it can be continued."""

    def start(
        self,
        run: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Open a run, once. `run` and `parent` are keys chosen by the caller, which later calls use for the run."""

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """Log (name, value, step) triples."""

    def describe(self, run: str, text: str, *, study: bool = False) -> None:
        """Set the Markdown description of a run, or of the study that it belongs to."""

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Store a file, or a folder with all its contents."""

    def image(self, run: str, key: str, png: bytes) -> None:
        """Store an image for the UI's gallery."""

    def data(self, run: str, name: str, digest: str, context: str, about: Mapping[str, Any]) -> None:
        """Record a data set that a run used, its purpose (`context`), and plain facts about it."""

    def checkpoint(self, run: str, path: Path, folder: str, about: Mapping[str, Any]) -> None:
        """Store a checkpoint's files and register it as a model that can be loaded and served.

        Args:
            folder: where to put it among the run's artifacts.
            about: `class_names`, `template`, `description`, and `tags` of the registered version.
        """

    def rank(self, run: str, protocol: str, accuracies: Mapping[str, float]) -> None:
        """Record the worst-case accuracies (percent) that a run measured under one protocol, keyed by the fingerprint
        of the registered checkpoint's weights."""

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as a table that the UI shows."""

    def finish(self, run: str, *, failed: bool = False) -> None:
        """Close a run."""

    def deliver(self) -> int:
        """Send all waiting entries, those of workers included, if the tracker answers; return how many remain."""

    def close(self) -> int:
        """Deliver at the end of a command, retrying for a while; return how many entries remain."""

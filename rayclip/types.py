"""Small types shared by the whole package. Imports no other module of the package."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Ranking = Literal["worst case", "clean", "mean"]  # the accuracy that models are ranked by; `mean` of the two
WORST = "worst"  # stands in place of an attack's name for the worst case over several attacks

# `user:password@` before a host, and the query options of an address that carry credentials
_PASSWORD = re.compile(r"(?<=://)([^\s/?#@:]*):[^\s/?#]*@")
_KEY = re.compile(
    r"(?i)(?<=[?&])((?:[\w.%-]*(?:access_?key|secret|token|passw|credential|signature|api_?key)[\w.%-]*|sig|key)=)"
    r"[^\s&#]*?(?=[\"'.,;:)]*(?:[\s&#]|$))"
)


# Characters that steer a terminal or turn the writing direction: file names and contents may hold them
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def redacted(text: str) -> str:
    """Return the text with passwords, keys and tokens removed from the addresses in it."""
    return _KEY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def has_secret(address: str) -> bool:
    """Return whether an address holds a password or a key; a user name alone is not a secret."""
    return redacted(address) != address


class UserError(Exception):
    """An error the user can fix; its message is one clear sentence that says what to do. The command line exits with 2.

    Secrets in addresses within the message are removed; line ends become blanks, control characters are escaped.
    """

    def __init__(self, sentence: str = "") -> None:
        line = " ".join(redacted(sentence).splitlines())
        super().__init__(_STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), line))


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
    """One number of a result table together with its protocol. Accuracies are in percent.

    Attributes:
        top1: of images that are right before and after the attack, in all judgements.
        mean: the same, averaged over repeated judgements by a random defence; None for a single judgement.
    """

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
    mean: float | None = None

    @property
    def is_worst(self) -> bool:
        """Return whether this is the worst case over several attacks."""
        return "worst_of" in self.protocol

    def who(self, labels: Mapping[str, str] | None = None) -> str:
        """Return the model's label (or name, if it has none) with its scorer and its defence."""
        return full_name((labels or {}).get(self.model, self.model), self.scorer, self.defense)


def full_name(model: str, scorer: str, defense: str) -> str:
    """Return a model's name with its scorer and its defence, unless they are the usual ones."""
    name = model if scorer == "template" else f"{model}, {scorer}"
    return name if defense == "none" else f"{name} + {defense}"

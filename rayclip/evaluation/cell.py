"""A cell: one model, one data set, one attack, under one protocol. Its id names its results on disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rayclip import PROTOCOL
from rayclip.attacks import Attack
from rayclip.attacks.bert import TextSettings
from rayclip.attacks.semantic import SemanticEnsemble
from rayclip.attacks.substitutes import TOKEN_TABLE
from rayclip.data import ImageSet, Names, Resolution
from rayclip.data.captions import read_captions
from rayclip.models import TEMPLATE, Precision
from rayclip.types import UserError
from rayclip.units import format_budget, in_255ths

DEFAULT_MASKED_LM = "bert-base-uncased"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all cells of an evaluation share.

    Attributes:
        eps: budget of the image attacks, in pixel units; None where there is none.
        seed: of the attacks' random starts.
        resolution: `native` or `model` (see `data.images`).
        names: spelling of the classes: CLIP's curated one, or the data's own (the reference code's).
        template: the class prompts.
        precision: of the model that is attacked; verdicts are always the fp32 model's (`evaluation.confirm`).
    """

    eps: float | None = None
    seed: int = 0
    resolution: Resolution = "native"
    names: Names = "curated"
    template: str = TEMPLATE
    precision: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one number stands on.

    `model` and `data` are how the user named them; the fingerprints are what they are, and only those enter the id.
    """

    model: str
    model_fingerprint: str
    data: str
    dataset: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    attack: Attack
    protocol: Protocol

    @cached_property
    def id(self) -> str:
        """A hash of everything that can change a verdict, the package's protocol number included."""
        decisive = [self.model_fingerprint, self.data_fingerprint, self.class_names, self.describe()]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def texts_id(self) -> str:
        """Equal for all cells whose attack prepares the same adversarial prompts."""
        settings = self.attack.describe_prepared()
        decisive = [PROTOCOL, self.model_fingerprint, self.class_names, self.protocol.template, settings]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def eps(self) -> float | None:
        return self.protocol.eps if self.attack.needs_eps else None

    @property
    def precision(self) -> Precision:
        """Of the model that is attacked; fp32 where no image is."""
        return self.protocol.precision if self.attack.needs_eps else "fp32"

    @property
    def attack_label(self) -> str:
        """The attack in metric names: `pgd-100_eps1`, `bert`."""
        return label_with_eps(self.attack, self.eps)

    def describe(self) -> dict[str, Any]:
        """The protocol as every result row carries it."""
        return {
            "attack": self.attack.name,
            **({} if self.eps is None else {"eps": format_budget(self.eps)}),
            **self.attack.describe(),
            "seed": self.protocol.seed,
            "resolution": self.protocol.resolution,
            "class_names": self.protocol.names,
            "template": self.protocol.template,
            "scorer": "template",
            "defense": "none",
            "precision": self.precision,
            "protocol": PROTOCOL,
        }

    @property
    def cost(self) -> int:
        """Forwards per image, roughly: what the plan sorts by."""
        return 1 + self.attack.cost


def label_with_eps(attack: Attack, eps: float | None) -> str:
    return attack.label if eps is None else f"{attack.label}_eps{in_255ths(eps)}"


def check_budget(attack: Attack, eps: float | None) -> None:
    """Raise a `UserError` if the attack needs a budget and there is none."""
    if attack.needs_eps and eps is None:
        raise UserError(f"attack '{attack.name}' needs a budget: give --eps, for example --eps 1/255.")


def make_cells(
    models: Sequence[tuple[str, str]],
    datasets: Sequence[tuple[str, ImageSet]],
    attacks: Sequence[Attack],
    protocol: Protocol,
) -> list[Cell]:
    """Every model × data set × attack.

    Args:
        models: (specification, fingerprint) pairs.
        datasets: (specification, opened data set) pairs.

    Raises:
        UserError: an attack needs a budget and there is none, is not defined for a data set's few classes, or names a
            file that cannot be used.
    """
    for attack in attacks:
        check_budget(attack, protocol.eps)
    attacks = [attack.pinned() for attack in attacks]
    return [
        Cell(
            model=spec,
            model_fingerprint=fingerprint,
            data=source,
            dataset=data.name,
            data_fingerprint=data.fingerprint,
            class_names=data.class_names,
            attack=with_captions(
                with_substitutes(attack, bundled=source == "digits").for_classes(len(data.class_names)),
                data.class_names,
            ),
            protocol=protocol,
        )
        for spec, fingerprint in models
        for source, data in datasets
        for attack in attacks
    ]


def default_substitutes(*, bundled: bool) -> str:
    """The token table at the bundled scale, which must need no download; the papers' masked LM elsewhere."""
    return TOKEN_TABLE if bundled else DEFAULT_MASKED_LM


def with_substitutes(attack: Attack, *, bundled: bool) -> Attack:
    """The attack with its source of substitutes spelled out."""
    if isinstance(attack, TextSettings) and attack.substitutes == "default":
        return attack.with_substitutes(default_substitutes(bundled=bundled))
    return attack


def with_captions(attack: Attack, class_names: Sequence[str]) -> Attack:
    """The attack with what is in its table of captions: the table is read here, and no worker needs it."""
    if isinstance(attack, SemanticEnsemble) and attack.captions and not attack.texts:
        return attack.with_texts(read_captions(attack.captions, class_names), class_names)
    return attack

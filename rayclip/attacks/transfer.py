"""Transfer attack: adversarial examples are made on one model and evaluated on another."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

from rayclip.attacks.base import Adversarial, Attack, GradientAttack, Norm, Prompts, Samples, Stop
from rayclip.attacks.registry import ATTACKS
from rayclip.models import ZeroShot, load_model
from rayclip.models.opening import load_once
from rayclip.settings import FILLED_IN
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class Transfer(GradientAttack):
    """An image attack that runs on a source model; the victim only sees the result.

    The source classifies with its own embeddings of the victim's class prompts, and takes pixels of any size.
    `Adversarial.queries_B` counts the source's forward passes. Images that the victim misclassifies stay unchanged.

    Attributes:
        source: the model to attack, a specification that `load_model` takes.
        attack: name of the attack to run on it; it takes those settings of this class that it has.
        stop: `final` by default: what fools the source early need not fool another model.
    """

    name: ClassVar[str] = "transfer"
    black_box: ClassVar[bool] = True
    asks_victim: ClassVar[bool] = False

    source: str = ""
    attack: str = "pgd"
    stop: Stop = "final"
    source_fingerprint: str = field(default="", metadata=FILLED_IN)

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("transfer needs the model to attack: write transfer:source=MODEL, as --model names models.")
        if self.attack == self.name:
            raise UserError("transfer:attack=transfer goes in circles: name an attack on images such as pgd.")
        if not self.inner.needs_eps or self.inner.describe_prepared() is not None:
            raise UserError(f"transfer:attack={self.attack} changes texts or nothing: name an attack on images.")

    @property
    def inner(self) -> Attack:
        """The attack on the source."""
        kind = ATTACKS.find(self.attack)
        shared = kind.settings().keys() & GradientAttack.settings().keys()
        return kind(**{name: getattr(self, name) for name in shared})

    @property
    def ball(self) -> Norm:
        return self.inner.ball

    @property
    def label(self) -> str:
        origin = re.sub(r"[^\w.-]+", "-", self.source.rstrip("/").rpartition("/")[2])
        return f"{self.name}_{self.inner.label}_from_{origin}"

    @property
    def cost(self) -> int:
        return self.inner.cost

    def pinned(self) -> Self:
        if self.source_fingerprint:
            return self
        return replace(self, source_fingerprint=load_model(self.source).fingerprint())

    def describe(self) -> dict[str, Any]:
        """Return the inner attack's settings; `source` is the model's fingerprint, not the name that was given for
        it."""
        return self.inner.describe() | {"inner": self.attack, "source": self.pinned().source_fingerprint}

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        device = str(samples.images_BCHW.device)
        source = _source(self.source, self.source_fingerprint, device, victim.class_names, victim.template)
        source = source.with_clip(source.clip.with_resize(victim.clip.resize))
        return self.inner.craft(source, samples, eps=eps)


@lru_cache(maxsize=4)
def _source(spec: str, fingerprint: str, device: str, class_names: tuple[str, ...], template: str) -> ZeroShot:
    return ZeroShot(load_once(spec, fingerprint, device), class_names, template)

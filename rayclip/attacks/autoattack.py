"""AutoAttack (Croce & Hein 2020): several attacks in turn, each on the samples that the previous ones did not break."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from rayclip import rng
from rayclip.attacks.base import Adversarial, Attack, Norm, Prompts, Samples, Stop
from rayclip.attacks.geometry import per_image
from rayclip.attacks.registry import ATTACKS
from rayclip.attacks.square import Schedule
from rayclip.models import ZeroShot
from rayclip.settings import FILLED_IN, leave_out


@dataclass(frozen=True, kw_only=True)
class InTurn(Attack):
    """Attacks in sequence; subclasses name the parts.

    If a part is not defined for the data's number of classes, it is replaced or left out, and the protocol names what
    runs: below four classes APGD-DLR replaces APGD-T, below three neither runs. The label stays the same, so that data
    sets of few and many classes share a column and its average, as in the papers' tables.

    `part_B` of the result tells which part broke a sample; steps and queries are sums over the parts, including the
    forward pass that judges each part.

    Attributes:
        iterations: for every part with such a setting; other settings are the parts' own defaults.
        norm: for every part.
        restarts: for every part with such a setting: random starts of each APGD.
        stop: for every part with such a setting: `final` where the attacked classifier is not the one that judges.
        classes: number of classes of the data.
    """

    PARTS: ClassVar[tuple[str, ...]]

    iterations: int = 100
    norm: Norm = "linf"
    restarts: int = 1
    stop: Stop = "first_success"
    classes: int | None = field(default=None, metadata=FILLED_IN)

    @property
    def label(self) -> str:
        restarts = "" if self.restarts == 1 else f"-x{self.restarts}"
        return self.name + restarts + ("" if self.norm == "linf" else f"_{self.norm}")

    @property
    def cost(self) -> int:
        return sum(part.cost for part in self.parts())

    @property
    def stops_early(self) -> bool:
        return self.stop == "first_success"

    def to_last_step(self) -> Self:
        return replace(self, stop="final")

    def for_classes(self, count: int) -> Self:
        return replace(self, classes=count)

    def parts(self) -> list[Attack]:
        """Return the attacks that run on data with `classes` classes (any number if None), in order."""
        chosen = []
        for name in self.PARTS:
            if name == "apgd-t" and self.classes is not None and self.classes < 4:
                name = "apgd-dlr"
            if name == "apgd-dlr" and self.classes is not None and self.classes < 3:
                continue
            kind = ATTACKS[name]
            shared = {s: getattr(self, s) for s in self.settings() if s in kind.settings()}
            part = kind(**shared)
            chosen.append(part if self.classes is None else part.for_classes(self.classes))
        return chosen

    def describe(self) -> dict[str, Any]:
        """Return own settings, the parts in order with their numbers of targets, and each part's settings as
        `part.setting`."""
        own, parts = leave_out(super().describe(), restarts=1, stop="first_success"), self.parts()
        names = []
        for part in parts:
            targets = part.describe().get("targets")
            if targets and self.classes:
                targets = min(targets, self.classes - 1)
            names.append(f"{part.name}({targets})" if targets else part.name)
        rest = {f"{p.name}.{k}": v for p in parts for k, v in p.describe().items() if k not in own}
        return own | {"parts": ", ".join(names)} | rest

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        images, labels, keys, todo = samples
        holds = torch.ones_like(labels, dtype=torch.bool) if todo is None else todo.clone()
        made = Adversarial.untouched(images)
        part_B = torch.zeros_like(labels)
        for place, part in enumerate(self.for_classes(len(victim.text_KD)).parts(), 1):
            at = holds.nonzero().squeeze(1)
            if not len(at):
                break
            turn = samples._replace(keys_B=rng.subkeys(keys, part.name), todo_B=holds)
            new = part.craft(victim, turn, eps=eps)
            images = torch.where(per_image(holds), new.images_BCHW, images)
            made = Adversarial(images, None, made.steps_B + new.steps_B, made.queries_B + new.queries_B + holds.long())
            with torch.no_grad():
                broken = victim(images[at], at).argmax(1) != labels[at]
            part_B[at], holds[at] = broken * place, ~broken
        return made._replace(part_B=part_B)


@dataclass(frozen=True, kw_only=True)
class AutoAttack(InTurn):
    """AutoAttack `standard`, as in the paper: APGD-CE, APGD-T, FAB-T and Square.

    Attributes:
        queries: of Square.
        schedule: of Square: `paper`, or `official` as in auto-attack's code; `Square` says which is stronger.
    """

    name: ClassVar[str] = "autoattack"
    PARTS: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t", "fab-t", "square")

    queries: int = 5000
    schedule: Schedule = "paper"


@dataclass(frozen=True, kw_only=True)
class AutoAttackSeeds(InTurn):
    """APGD-CE and APGD-DLR, as SAFT and TTC run them; on two classes APGD-CE alone."""

    name: ClassVar[str] = "autoattack-seeds"
    PARTS: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-dlr")


@dataclass(frozen=True, kw_only=True)
class APGDPair(InTurn):
    """APGD-CE, and APGD-T on what survives: the attack of RobustVLM, LEAF, LORE, ΔCLIP, ET3 and CLIPure.

    Their code, too, runs APGD-CE alone on two classes. Their papers count both attacks with 100 iterations.
    """

    name: ClassVar[str] = "apgd-ce+apgd-t"
    PARTS: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t")

    @property
    def label(self) -> str:
        return super().label.replace("+", "_")  # metrics' names have no plus sign

"""Attacks by name, and the text form in which users write them: `pgd:steps=100,step=1/255`."""

import math
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, Literal, get_args, get_origin

from rayclip.attacks.apgd import APGDCE, APGDDLR, APGDT
from rayclip.attacks.autoattack import AutoAttack, AutoAttackSeeds
from rayclip.attacks.base import Attack
from rayclip.attacks.bert import BertAttack
from rayclip.attacks.clean import Clean
from rayclip.attacks.co_attack import CoAttack
from rayclip.attacks.cw import CW
from rayclip.attacks.fab import FABT
from rayclip.attacks.feature import FeatureAttack
from rayclip.attacks.fgsm import FGSM
from rayclip.attacks.pgd import PGD, PGDL2
from rayclip.attacks.semantic import SemanticEnsemble
from rayclip.attacks.sep import SepAttack
from rayclip.attacks.sga import SGA
from rayclip.attacks.square import Square
from rayclip.attacks.transfer import Transfer
from rayclip.types import UserError
from rayclip.units import format_budget, parse_budget

ATTACKS: dict[str, type[Attack]] = {
    a.name: a
    for a in (
        Clean,
        FGSM,
        PGD,
        PGDL2,
        CW,
        APGDCE,
        APGDDLR,
        APGDT,
        FABT,
        Square,
        AutoAttack,
        AutoAttackSeeds,
        FeatureAttack,
        SemanticEnsemble,
        Transfer,
        BertAttack,
        SepAttack,
        CoAttack,
        SGA,
    )
}


def attack_class(name: str) -> type[Attack]:
    """One of ours, or one that another package offers through the entry-point group `rayclip.attacks`."""
    if name in ATTACKS:
        return ATTACKS[name]
    offered = {e.name: e for e in entry_points(group="rayclip.attacks")}
    if name in offered:
        return offered[name].load()
    raise UserError(f"unknown attack '{name}': use one of {', '.join(sorted({*ATTACKS, *offered}))}.")


_ABOUT = {
    "clean": "no attack",
    "fgsm": "one step of eps along the gradient's sign (Goodfellow et al. 2015)",
    "pgd": "steps along the gradient of the cross-entropy, l_inf or l_2 (Madry et al. 2018)",
    "pgd-l2": "PGD in an l_2 ball",
    "cw": "PGD on the logit margin (Carlini & Wagner 2017)",
    "apgd-ce": "PGD that chooses its step by itself, on the cross-entropy (Croce & Hein 2020)",
    "apgd-dlr": "the same on the difference of logits ratio",
    "apgd-t": "the same on the targeted DLR, toward each of the likeliest wrong classes",
    "fab-t": "looks for the nearest misclassified image (Croce & Hein 2020)",
    "square": "random search over square windows, by scores alone (Andriushchenko et al. 2020)",
    "autoattack": "APGD-CE, APGD-T, FAB-T and Square, each on what survives (Croce & Hein 2020)",
    "autoattack-seeds": "APGD-CE and APGD-DLR, as SAFT and TTC run it",
    "feature": "moves the image's embedding away from the clean one (FARE, TTC; AdvPT)",
    "semantic": "against several captions a class at once (SAFT)",
    "transfer": "made on another model, judged on this one",
    "bert": "BERT-Attack: changes words of the class prompts (Li et al. 2020)",
    "co-attack": "prompts first, then the image away from itself and from them (Zhang et al. 2022)",
    "sga": "prompts and image guided by each other, over scales (Lu et al. 2023)",
    "sep": "image and prompts attacked on their own, judged together (MMCoA's multimodal attack)",
}


def known_attacks() -> dict[str, type[Attack]]:
    """Every attack by its name, those of other packages last."""
    offered = {e.name: e.load() for e in entry_points(group="rayclip.attacks") if e.name not in ATTACKS}
    return {**ATTACKS, **offered}


def about(name: str, kind: type[Attack]) -> str:
    """An attack in one line; of another package's, the first line of its docstring."""
    return _ABOUT.get(name) or (kind.__doc__ or "").strip().split("\n")[0]


def shown_defaults(kind: type[Attack]) -> dict[str, str]:
    """What a user may set, with its default as a user would write it; `…` where there is none."""

    def written(key: str, value: Any) -> str:
        if isinstance(value, tuple):
            return "+".join(map(str, value))
        return format_budget(value) if key == "step" else str(value) or "…"

    return {f.name: written(f.name, f.default) for f in fields(kind) if f.name in kind.settings()}


def make_attack(name: str, **settings: Any) -> Attack:
    """An attack with settings given as values."""
    kind = attack_class(name)
    known = kind.settings()
    for key in settings:
        if key not in known:
            raise UserError(f"attack '{name}' has no setting '{key}': it has {', '.join(sorted(known)) or 'none'}.")
    return kind(**settings)


def parse_attacks(text: str, defaults: Mapping[str, Any]) -> list[Attack]:
    """`"clean,pgd:steps=100,step=1/255,bert"` as attacks, in that order.

    Args:
        defaults: settings for every attack that has them (`steps`, `substitutes`, ...) and does not name its own.

    Raises:
        UserError: unknown attack or setting, or a value that does not fit.
    """
    attacks: list[Attack] = []
    for name, written in _split(text):
        kind = attack_class(name)
        types = kind.settings()
        settings = {k: v for k, v in defaults.items() if k in types}
        for key, value in written.items():
            if key not in types:
                raise UserError(f"attack '{name}' has no setting '{key}': it has {', '.join(sorted(types)) or 'none'}.")
            settings[key] = _convert(name, key, value, types[key])
        attacks.append(kind(**settings))
    if len(set(attacks)) < len(attacks):
        raise UserError(f"--attacks '{text}' names an attack twice with the same settings: drop one.")
    return attacks


def _split(text: str) -> list[tuple[str, dict[str, str]]]:
    """A comma starts a new attack unless what follows is `key=value`, which belongs to the attack before it.

    Hence no value, a file's path included, can hold a comma.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for part in text.split(","):
        head, colon, first = part.strip().partition(":")
        is_setting = "=" in head and not (colon and "=" not in head)
        if is_setting:
            if not found:
                raise UserError(f"--attacks '{text}' starts with a setting: write NAME:KEY=VALUE, as in pgd:steps=100.")
            assignment = part.strip()
        elif head:
            found.append((head, {}))
            assignment = first
        else:
            raise UserError(f"--attacks '{text}' has an empty name: write names with commas between, as in clean,pgd.")
        if assignment or (colon and not is_setting):
            key, equals, value = assignment.partition("=")
            if not (equals and key and value):
                raise UserError(f"'{assignment}' in --attacks is no setting: write KEY=VALUE, as in pgd:steps=100.")
            found[-1][1][key.strip()] = value.strip()
    return found


def _convert(attack: str, key: str, value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{attack}:{key}={value} is not possible: use one of {', '.join(get_args(kind))}.")
        return value
    if kind is float and key == "step":
        return parse_budget(value, "step")
    if kind == tuple[float, ...]:
        return tuple(_convert(attack, key, part, float) for part in value.split("+"))
    if kind not in (int, float):
        return value
    try:
        number = kind(value)
    except ValueError:
        raise UserError(f"{attack}:{key}={value} is no {'whole ' if kind is int else ''}number.") from None
    if kind is int and number < 1:
        raise UserError(f"{attack}:{key}={value} must be at least 1.")
    if not math.isfinite(number):
        raise UserError(f"{attack}:{key}={value} is not finite.")
    return number

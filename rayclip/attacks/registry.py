"""Registry of attacks by name, and parser of the text form in which users write them: `pgd:steps=100,step=1/255`."""

import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

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
from rayclip.names import ATTACKS_ABOUT, unknown
from rayclip.settings import convert_all, split_names
from rayclip.types import UserError
from rayclip.units import Norm

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
    """Return the class of a built-in attack, or of one that another package offers as entry point `rayclip.attacks`."""
    if name in ATTACKS:
        return ATTACKS[name]
    offered = {e.name: e for e in entry_points(group="rayclip.attacks")}
    if name in offered:
        return offered[name].load()
    raise unknown("attack", name, sorted({*ATTACKS, *offered}))


def known_attacks() -> dict[str, type[Attack]]:
    """Return every attack by its name, those of other packages last."""
    offered = {e.name: e.load() for e in entry_points(group="rayclip.attacks") if e.name not in ATTACKS}
    return {**ATTACKS, **offered}


def about(name: str, kind: type[Attack]) -> str:
    """Return a one-line description of an attack; for another package's, the first line of its docstring."""
    return ATTACKS_ABOUT.get(name) or (kind.__doc__ or "").strip().split("\n")[0]


def make_attack(name: str, **settings: Any) -> Attack:
    """Return an attack with settings given as values."""
    kind = attack_class(name)
    known = kind.settings()
    for key in settings:
        if key not in known:
            raise UserError(f"attack '{name}' has no setting '{key}': it has {', '.join(sorted(known)) or 'none'}.")
    return kind(**settings)


def own_norm(kind: type[Attack]) -> Norm:
    """Return the norm in which an attack measures its budget unless its settings choose another."""
    return "l2" if any(f.name == "norm" and f.default == "l2" for f in fields(kind)) else "linf"


def _norm(kind: type[Attack], written: Mapping[str, str]) -> Norm:
    return "l2" if written.get("norm", own_norm(kind)) == "l2" else "linf"


def attack_as_described(protocol: Mapping[str, Any]) -> Attack:
    """Return the attack that a result's protocol describes: the inverse of `Attack.describe`.

    Raises:
        UserError: the attack is unknown, or the protocol does not describe it in full (such as a file's contents).
    """
    name = protocol["attack"]
    types = attack_class(name).settings()
    spelled = {k: v for k in types if k != "attack" and (v := protocol.get(k)) not in (None, "")}
    written = {k: "+".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for k, v in spelled.items()}
    try:
        attack = make_attack(name, **convert_all("attack", name, written, types, _norm(attack_class(name), written)))
        described = attack.describe()
    except (UserError, ValueError):
        described = {"attack": None}
    said, ours = (json.loads(json.dumps(dict(d))) for d in (protocol, described))
    if any(said[key] != value for key, value in ours.items() if key in said):
        raise UserError(f"attack '{name}' cannot be repeated from its results alone: use rayclip eval instead.")
    return attack


def parse_attacks(text: str, defaults: Mapping[str, Any]) -> list[Attack]:
    """Parse `"clean,pgd:steps=100,step=1/255,bert"` into attacks, in that order.

    Args:
        defaults: settings for every attack that has them (`steps`, `substitutes`, ...) and does not set its own.

    Raises:
        UserError: unknown attack or setting, or an invalid value.
    """
    attacks: list[Attack] = []
    for name, written in split_names(text, "--attacks", "pgd:steps=100"):
        kind = attack_class(name)
        types = kind.settings()
        own = convert_all("attack", name, written, types, _norm(kind, written))
        attacks.append(kind(**{k: v for k, v in defaults.items() if k in types} | own))
    if len(set(attacks)) < len(attacks):
        raise UserError(f"--attacks '{text}' names an attack twice with the same settings: drop one.")
    return attacks

"""Attacks by name, and the text form in which users write them: `pgd:steps=100,step=1/255`."""

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, Literal, get_args, get_origin

from rayclip.attacks.base import Attack
from rayclip.attacks.bert import BertAttack
from rayclip.attacks.clean import Clean
from rayclip.attacks.co_attack import CoAttack
from rayclip.attacks.pgd import PGD
from rayclip.attacks.sep import SepAttack
from rayclip.attacks.sga import SGA
from rayclip.types import UserError
from rayclip.units import parse_budget

ATTACKS: dict[str, type[Attack]] = {a.name: a for a in (Clean, PGD, BertAttack, SepAttack, CoAttack, SGA)}


def attack_class(name: str) -> type[Attack]:
    """One of ours, or one that another package offers through the entry-point group `rayclip.attacks`."""
    if name in ATTACKS:
        return ATTACKS[name]
    offered = {e.name: e for e in entry_points(group="rayclip.attacks")}
    if name in offered:
        return offered[name].load()
    raise UserError(f"unknown attack '{name}': use one of {', '.join(sorted({*ATTACKS, *offered}))}.")


def make_attack(name: str, **settings: Any) -> Attack:
    """An attack with settings given as values."""
    kind = attack_class(name)
    known = {f.name for f in fields(kind)}
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
        types = {f.name: f.type for f in fields(kind)}
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
    """A comma starts a new attack unless what follows is `key=value`, which belongs to the attack before it."""
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
    return number

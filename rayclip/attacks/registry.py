"""Attacks by name."""

import json
from collections.abc import Mapping
from typing import Any

from rayclip.attacks.base import Attack
from rayclip.names import ATTACKS_ABOUT, Configurables
from rayclip.settings import convert_all
from rayclip.types import UserError

ATTACKS: Configurables[Attack] = Configurables(
    "attack",
    "attacks",
    Attack,
    option="--attacks",
    example="pgd:steps=100",
    about=ATTACKS_ABOUT,
)


def make_attack(text: str, /, **settings: Any) -> Attack:
    """Return an attack: `make_attack("pgd:steps=100", step=1/255)`.

    Raises:
        UserError: unknown attack or setting, or an invalid value.
    """
    return ATTACKS.make(text, **settings)


def attack_as_described(protocol: Mapping[str, Any]) -> Attack:
    """Return the attack that a result's protocol describes: the inverse of `Attack.describe`.

    Raises:
        UserError: the attack is unknown, or the protocol does not describe it in full (such as a file's contents).
    """
    name = protocol["attack"]
    kind = ATTACKS.find(name)
    types = kind.settings()
    spelled = {k: v for k in types if k != "attack" and (v := protocol.get(k)) not in (None, "")}
    written = {k: "+".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for k, v in spelled.items()}
    written |= {k: str(v).lower() for k, v in spelled.items() if isinstance(v, bool)}
    try:
        attack = kind.with_settings(convert_all("attack", name, written, types, kind.default_norm()))
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
    return ATTACKS.parse(text, defaults)

"""Parse and format names with settings as written on the command line: `pgd:steps=100,step=1/255`."""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rayclip.types import UserError
from rayclip.units import Norm, format_budget, parse_budget

# Metadata of fields that the package fills in itself, such as the content of a file named by a setting
FILLED_IN = {"filled_in": True}
BUDGETS = ("eps", "step")  # settings in pixel units, which people write as fractions


def settable(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass that a user may set, as name -> type."""
    return {f.name: f.type for f in fields(kind) if not f.metadata.get("filled_in")}


def written(key: str, value: Any) -> Any:
    """Return a setting's value as a user would write it, budgets as fractions."""
    return format_budget(value) if key in BUDGETS and value is not None else value


def with_changes(owner: Any) -> str:
    """Return the name of a named dataclass with its non-default settings: `ttc:eps=2/255,steps=3`."""
    changed = [f for f in fields(owner) if f.name in settable(type(owner)) and getattr(owner, f.name) != f.default]
    settings = ",".join(f"{f.name}={written(f.name, getattr(owner, f.name))}" for f in changed)
    return f"{owner.name}:{settings}" if settings else owner.name


def shown_defaults(kind: type) -> dict[str, str]:
    """Return the settable fields with their defaults as a user would write them; `…` where there is no default."""

    def shown(key: str, value: Any) -> str:
        if isinstance(value, tuple):
            return "+".join(map(str, value))
        return "…" if value in ("", None) else str(written(key, value))

    return {f.name: shown(f.name, f.default) for f in fields(kind) if f.name in settable(kind)}


def split_names(text: str, option: str, example: str) -> list[tuple[str, dict[str, str]]]:
    """Split `"clean,pgd:steps=100,step=1/255"` into (name, settings as text) pairs, in order.

    A comma starts a new name, unless `key=value` follows it, which belongs to the name before.
    Values, file paths included, cannot contain commas.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for part in text.split(","):
        head, colon, first = part.strip().partition(":")
        is_setting = "=" in head and not (colon and "=" not in head)
        if is_setting:
            if not found:
                raise UserError(f"{option} '{text}' starts with a setting: write NAME:KEY=VALUE, as in {example}.")
            assignment = part.strip()
        elif head:
            found.append((head, {}))
            assignment = first
        else:
            raise UserError(f"{option} '{text}' has an empty name: write names with commas between, as in {example}.")
        if assignment or (colon and not is_setting):
            key, equals, value = assignment.partition("=")
            if not (equals and key and value):
                raise UserError(f"'{assignment}' in {option} is no setting: write KEY=VALUE, as in {example}.")
            found[-1][1][key.strip()] = value.strip()
    return found


def split_chains(text: str) -> list[list[str]]:
    """Split `"none,ttc:eps=4/255,steps=2+tte"` into chains, each a list of links; a comma before `key=value` does not
    split."""
    chains: list[list[str]] = []
    for part in text.split(","):
        first, *rest = part.split("+")
        if "=" in first.partition(":")[0] and chains:
            chains[-1][-1] += "," + first
        else:
            chains.append([first.strip()])
        chains[-1] += [link.strip() for link in rest]
    return chains


def convert_all(
    what: str, name: str, written: Mapping[str, str], types: Mapping[str, Any], norm: Norm = "linf"
) -> dict[str, Any]:
    """Convert settings from text to values.

    Args:
        what: the kind of thing that `name` refers to, such as `attack` or `defense`.
        types: the type of each setting.
        norm: norm in which budgets are measured.

    Raises:
        UserError: unknown setting, or a value of the wrong type.
    """
    for key in written:
        if key not in types:
            raise UserError(f"{what} '{name}' has no setting '{key}': it has {', '.join(sorted(types)) or 'none'}.")
    return {key: _convert(name, key, value, types[key], norm) for key, value in written.items()}


def _convert(owner: str, key: str, value: str, kind: Any, norm: Norm = "linf") -> Any:
    if get_origin(kind) in (Union, UnionType):  # `float | None`: users never write None
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{owner}:{key}={value} is not possible: use one of {', '.join(get_args(kind))}.")
        return value
    if kind is float and key in BUDGETS:
        return parse_budget(value, key, norm)
    if kind == tuple[float, ...]:
        return tuple(_convert(owner, key, part, float) for part in value.split("+"))
    if kind not in (int, float):
        return value
    try:
        number = kind(value)
    except ValueError:
        raise UserError(f"{owner}:{key}={value} is no {'whole ' if kind is int else ''}number.") from None
    if kind is int and number < 1:
        raise UserError(f"{owner}:{key}={value} must be at least 1.")
    if not math.isfinite(number):
        raise UserError(f"{owner}:{key}={value} is not finite.")
    return number

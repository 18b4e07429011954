"""Names with settings as people write them, `pgd:steps=100,step=1/255`, and the base class of all that have them."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from rayclip.types import UserError
from rayclip.units import Norm, format_budget, parse_budget

# Metadata of fields that the package fills in itself, such as the content of a file named by a setting
FILLED_IN = {"filled_in": True}
BUDGETS = ("eps", "step")  # settings in pixel units, which people write as fractions
FromZero = Annotated[int, "0 or more"]  # an `int` is at least 1


@dataclass(frozen=True, kw_only=True)
class Configurable:
    """Base of attacks, methods, defences and scorers: a frozen dataclass with a name, whose fields are its settings.

    A setting is an `int`, `FromZero`, `float`, `bool`, `str`, a `Literal`, or a tuple of these, also `| None`. A field
    that is a dataclass itself lends its own settings. Other fields, and those with the metadata `FILLED_IN`, are none.
    """

    noun: ClassVar[str]  # the kind of thing, for messages: `attack`
    name: ClassVar[str]

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the settings that a user may choose, as name -> type."""
        return settable(cls)

    @classmethod
    def default_norm(cls) -> Norm:
        """Return the norm in which budgets are measured unless the setting `norm` says otherwise."""
        return "l2" if any(f.name == "norm" and f.default == "l2" for f in fields(cls)) else "linf"

    @classmethod
    def with_settings(cls, values: Mapping[str, Any]) -> Self:
        """Return an instance with these values of settings or of other fields.

        Raises:
            UserError: a setting that it does not have, or a value that it rejects.
        """
        given = dict(values)
        for field in fields(cls):
            if _is_group(kind := _types(cls)[field.name]):
                own = {key: given.pop(key) for key in settable(kind) if key in given}
                if own:
                    given[field.name] = replace(given.get(field.name, _default(field)), **own)
        check_known(cls.noun, cls.name, given.keys() - _others(cls), cls.settings())
        return cls(**given)

    def captions_needed(self, bundled: str) -> str:
        """Return the place to read captions of the classes from before work starts: a table, or a folder with one per
        data set; empty for nothing to read. `data.captions.bind_captions` reads them and calls `with_texts`.

        Args:
            bundled: name of the data if captions come with it; else empty.

        Raises:
            UserError: it needs captions and has none.
        """
        return ""

    def with_texts(self, texts: Sequence[Sequence[str]], class_names: Sequence[str] = (), captions: str = "") -> Self:
        """Return it with the captions of each class, best first, so that no worker needs their table.

        Args:
            captions: the table that they were read from.

        Raises:
            UserError: a class has too few captions.
        """
        return self


def settable(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass that a user may set, as name -> type."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        one = _types(kind)[field.name]
        if _is_group(one):
            found |= settable(one)
        elif not field.metadata.get("filled_in") and _is_writable(one):
            found[field.name] = one
    return found


def _types(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, also where its module postpones annotations."""
    found: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    return get_type_hints(kind, include_extras=True) if any(isinstance(t, str) for t in found.values()) else found


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _is_writable(kind: Any) -> bool:
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        return _is_writable(get_args(kind)[0])
    return kind in (int, float, bool, str, FromZero) or get_origin(kind) is Literal


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    kinds = [k for k in get_args(kind) if k is not NoneType]
    return kinds[0] if len(kinds) == 1 else kind


def _others(kind: type) -> set[str]:
    """Return the fields that are no settings."""
    return {f.name for f in fields(kind)} - set(settable(kind))


def check_known(noun: str, name: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `UserError` for a setting that `name` does not have; the message suggests a similar one."""
    names = sorted(known)
    for key in keys:
        if key not in names:
            has = ", ".join(names) or "none"
            raise UserError(f"{noun} '{name}' has no setting '{key}': {suggest(key, names)}it has {has}.")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean pgd? ` if `name` resembles one of the known names, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""


def format_value(key: str, value: Any) -> Any:
    """Return a setting's value as a user would write it, budgets as fractions."""
    return format_budget(value) if key in BUDGETS and value is not None else value


def leave_out(described: Mapping[str, Any], **usual: Any) -> dict[str, Any]:
    """Return a description without settings that have these values, so that results from before they existed keep their
    ids."""
    return {key: value for key, value in described.items() if key not in usual or value != usual[key]}


def format_changes(owner: Configurable) -> str:
    """Return the name with the settings that differ from the defaults: `ttc:eps=2/255,steps=3`."""
    changed = [f for f in fields(owner) if f.name in settable(type(owner)) and getattr(owner, f.name) != f.default]
    settings = ",".join(f"{f.name}={_spell(f.name, getattr(owner, f.name))}" for f in changed)
    return f"{owner.name}:{settings}" if settings else owner.name


def format_defaults(kind: type[Configurable]) -> dict[str, str]:
    """Return the settings with their defaults as a user would write them; `…` where there is no default."""

    def of(owner: type) -> dict[str, str]:
        shown: dict[str, str] = {}
        for field in fields(owner):
            if _is_group(inner := _types(owner)[field.name]):
                shown |= of(inner)
            else:
                shown[field.name] = "…" if field.default in ("", None, MISSING) else _spell(field.name, field.default)
        return shown

    found = of(kind)
    return {name: found[name] for name in kind.settings()}


def format_type(kind: Any) -> str:
    """Return how values of a setting's type are written: `number`, `linf|l2`, `number+number`."""
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        return f"{format_type(get_args(kind)[0])}+…"
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {bool: "true|false", str: "text", float: "number"}.get(kind, "whole number")


def _spell(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(_spell(key, v) for v in value)
    return str(value).lower() if isinstance(value, bool) else str(format_value(key, value))


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
            key = key.strip()
            if key in found[-1][1]:
                raise UserError(f"{option} '{text}' sets {key} twice: write it once, as in {example}.")
            found[-1][1][key] = value.strip()
    return found


def split_one(text: str, option: str, example: str) -> tuple[str, dict[str, str]]:
    """Split `"pgd:steps=100"` into one name and its settings as text."""
    names = split_names(text, option, example)
    if len(names) > 1:
        raise UserError(f"{option} takes one name, and '{text}' has {len(names)}: write one, as in {example}.")
    return names[0]


def format_name(name: str, written: Mapping[str, str]) -> str:
    """Join what `split_names` split: `pgd:steps=100,step=1/255`."""
    return f"{name}:{','.join(f'{key}={value}' for key, value in written.items())}" if written else name


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
    noun: str, name: str, written: Mapping[str, str], types: Mapping[str, Any], norm: Norm = "linf"
) -> dict[str, Any]:
    """Convert settings from text to values.

    Args:
        noun: the kind of thing that `name` refers to, such as `attack` or `defence`.
        types: the type of each setting.
        norm: norm in which budgets are measured, unless a setting `norm` is written.

    Raises:
        UserError: unknown setting, or a value of the wrong type.
    """
    check_known(noun, name, written, types)
    norm = "l2" if written.get("norm", norm) == "l2" else "linf"
    return {key: convert(f"{name}:{key}=", key, value, types[key], norm) for key, value in written.items()}


def convert(what: str, key: str, value: str, kind: Any, norm: Norm = "linf") -> Any:
    """Convert a setting's value from text; `what` stands before it in messages: `pgd:steps=`."""
    kind = _without_none(kind)  # users never write None
    if get_origin(kind) is tuple:
        return tuple(convert(what, key, part, get_args(kind)[0], norm) for part in value.split("+"))
    choices = {"true": True, "false": False} if kind is bool else {str(choice): choice for choice in get_args(kind)}
    if kind is bool or get_origin(kind) is Literal:
        if value not in choices:
            raise UserError(f"{what}{value} is not possible: use one of {', '.join(choices)}.")
        return choices[value]
    if kind is float and key in BUDGETS:
        return parse_budget(value, key, norm)
    if kind is str:
        return value
    return _number(f"{what}{value}", value, kind)


def _number(what: str, value: str, kind: Any) -> int | float:
    try:
        number = float(value) if kind is float else int(value)
    except ValueError:
        raise UserError(f"{what} is no {'' if kind is float else 'whole '}number.") from None
    least = 0 if kind == FromZero else 1
    if kind is not float and number < least:
        raise UserError(f"{what} must be at least {least}.")
    if not math.isfinite(number):
        raise UserError(f"{what} is not finite.")
    return number

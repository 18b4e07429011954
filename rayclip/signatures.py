"""Names and settings of attacks, defences, scorers and methods, known before torch is imported.

`signatures.json` is written from the registries by `python -m rayclip.signatures`; a test holds the two together. What
other packages offer is not in it, and is checked when they are loaded.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from rayclip.settings import convert_all, split_chains, split_names
from rayclip.types import UserError
from rayclip.units import Norm

Kind = Literal["attack", "defence", "scorer", "method"]

FILE = Path(__file__).with_name("signatures.json")
_GROUPS: dict[Kind, str] = {"attack": "attacks", "defence": "defenses", "scorer": "scorers", "method": "methods"}
_PLAIN = {"int": int, "float": float, "str": str, "floats": tuple[float, ...]}


class Signature(NamedTuple):
    """What can be known of an attack, a defence, a scorer or a method from its name.

    Attributes:
        settings: types by name, as `settings.convert_all` takes them.
        needs_eps: an attack on images, which wants a budget.
        for_pairs: an attack that `rayclip retrieval` can run.
        norm: that its budget is measured in unless its settings say another.
    """

    settings: Mapping[str, Any]
    needs_eps: bool = False
    for_pairs: bool = False
    norm: Norm = "linf"


@cache
def signatures(kind: Kind) -> dict[str, Signature]:
    """Ours, by name."""
    found = json.loads(FILE.read_text())[kind]
    return {name: Signature(**{**entry, "settings": _types(entry["settings"])}) for name, entry in found.items()}


def check_attacks(text: str, *, has_budget: bool, on_pairs: bool = False) -> None:
    """Refuse what `--attacks` cannot mean.

    Args:
        has_budget: `--eps` is given.
        on_pairs: the attacks are for retrieval.

    Raises:
        UserError: unknown attack or setting, a value that does not fit, or an attack that has no budget.
    """
    for name, written in split_names(text, "--attacks", "pgd:steps=100"):
        found = _find("attack", name)
        if found is None:
            continue
        norm = written.get("norm", found.norm)
        convert_all("attack", name, written, found.settings, "l2" if norm == "l2" else "linf")
        if on_pairs and not found.for_pairs:
            raise not_for_pairs(name, (n for n, s in signatures("attack").items() if s.for_pairs))
        if found.needs_eps and not has_budget and "eps" not in written:
            raise no_budget(name)


def check_defenses(text: str) -> None:
    """Refuse what `--defense` cannot mean: unknown defence or setting, or a value that does not fit (`UserError`)."""
    for link in (link for chain in split_chains(text) if chain != ["none"] for link in chain):
        ((name, written),) = split_names(link, "--defense", "ttc:eps=4/255")
        found = _find("defence", name)
        if found is not None:
            convert_all("defence", name, written, found.settings)


def check_scorers(text: str) -> None:
    """Refuse what `--scorer` cannot mean: unknown scorer or setting, or a value that does not fit (`UserError`)."""
    for name, written in split_names(text, "--scorer", "cupl:captions=FILE"):
        found = _find("scorer", name)
        if found is not None:
            convert_all("scorer", name, written, found.settings)


def check_methods(names: Iterable[str]) -> None:
    """Refuse names that no training method has (`UserError`)."""
    for name in names:
        _find("method", name)


def no_budget(name: str) -> UserError:
    """What to raise for an attack that needs a budget and has none."""
    return UserError(f"attack '{name}' needs a budget: give --eps, for example --eps 1/255, or {name}:eps=1/255.")


def not_for_pairs(name: str, known: Iterable[str]) -> UserError:
    """What to raise for an attack that cannot be run on image-caption pairs."""
    return UserError(f"attack '{name}' is for classification: for retrieval use one of {', '.join(sorted(known))}.")


def unknown(kind: Kind, name: str, known: Iterable[str]) -> UserError:
    """What to raise for a name that nothing has."""
    use = "use none or one of" if kind == "defence" else "use one of"
    return UserError(f"unknown {kind} '{name}': {use} {', '.join(known)}.")


def _find(kind: Kind, name: str) -> Signature | None:
    """None for what another package offers."""
    ours = signatures(kind)
    if name in ours:
        return ours[name]
    offered = {e.name for e in entry_points(group=f"rayclip.{_GROUPS[kind]}")}
    if name not in offered:
        raise unknown(kind, name, sorted({*ours, *offered}))
    return None


def _types(spelled: Mapping[str, str | list[str]]) -> dict[str, Any]:
    return {key: Literal[tuple(value)] if isinstance(value, list) else _PLAIN[value] for key, value in spelled.items()}


def _spelled(kind: Any) -> str | list[str]:
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return next((word for word, plain in _PLAIN.items() if kind == plain), "str")


def collect() -> dict[str, dict[str, Any]]:
    """The contents of `signatures.json`, from the registries."""
    from rayclip.attacks.registry import ATTACKS, own_norm
    from rayclip.defenses.registry import DEFENSES
    from rayclip.methods import METHODS
    from rayclip.models.scorers import SCORERS
    from rayclip.settings import settable

    def settings(types: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _spelled(kind) for name, kind in types.items()}

    attacks = {
        name: {
            "settings": settings(kind.settings()),
            "needs_eps": kind.needs_eps,
            "for_pairs": kind.for_pairs,
            "norm": own_norm(kind),
        }
        for name, kind in ATTACKS.items()
    }
    others: dict[str, Mapping[str, type]] = {"defence": DEFENSES, "scorer": SCORERS, "method": METHODS}
    rest = {
        what: {name: {"settings": settings(settable(kind))} for name, kind in kinds.items()}
        for what, kinds in others.items()
    }
    return {"attack": attacks, **rest}


if __name__ == "__main__":
    FILE.write_text(json.dumps(collect(), indent=1) + "\n")

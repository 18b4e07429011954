"""Names and settings of attacks, defences, scorers and methods, available without importing torch.

`python -m rayclip.signatures` writes `signatures.json` from the registries; a test checks that the two agree. Plug-ins
of other packages are not in the file; their settings are checked when they are loaded.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from rayclip.registry import known_names, unknown
from rayclip.settings import Configurable, FromZero, convert_all, split_chains, split_names, split_one
from rayclip.types import UserError
from rayclip.units import Norm

Kind = Literal["attack", "defence", "scorer", "method"]

FILE = Path(__file__).with_name("signatures.json")
_GROUPS: dict[Kind, str] = {"attack": "attacks", "defence": "defenses", "scorer": "scorers", "method": "methods"}
_PLAIN = {"int": int, "from 0": FromZero, "bool": bool, "float": float, "str": str, "floats": tuple[float, ...]}


class Signature(NamedTuple):
    """The settings of an attack, a defence, a scorer or a method, and what an attack needs.

    Attributes:
        settings: name -> type, as `settings.convert_all` takes them.
        needs_eps: whether it is an attack on images, which needs a budget.
        for_pairs: whether it is an attack that `rayclip retrieval` can run.
        norm: norm of its budget, unless its settings choose another.
    """

    settings: Mapping[str, Any]
    needs_eps: bool = False
    for_pairs: bool = False
    norm: Norm = "linf"


@cache
def signatures(kind: Kind) -> dict[str, Signature]:
    """Return the package's own signatures of a kind, by name."""
    found = json.loads(FILE.read_text())[kind]
    return {name: Signature(**{**entry, "settings": _types(entry["settings"])}) for name, entry in found.items()}


def check_attacks(text: str, *, has_budget: bool, on_pairs: bool = False) -> None:
    """Validate the value of `--attacks`.

    Args:
        has_budget: whether `--eps` is given.
        on_pairs: whether the attacks are for retrieval.

    Raises:
        UserError: unknown attack or setting, a value of the wrong type, an attack that needs a budget and has none, or
            for retrieval an attack that cannot run on pairs.
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
    """Raise a `UserError` if `--defense` has an unknown defence or setting, or a value of the wrong type."""
    for link in (link for chain in split_chains(text) if chain != ["none"] for link in chain):
        ((name, written),) = split_names(link, "--defense", "ttc:eps=4/255")
        found = _find("defence", name)
        if found is not None:
            convert_all("defence", name, written, found.settings)


def check_scorers(text: str) -> None:
    """Raise a `UserError` if `--scorer` has an unknown scorer or setting, or a value of the wrong type."""
    for name, written in split_names(text, "--scorer", "cupl:captions=FILE"):
        found = _find("scorer", name)
        if found is not None:
            convert_all("scorer", name, written, found.settings)


def check_methods(text: str) -> None:
    """Raise a `UserError` if `--methods` has an unknown method or setting, or a value of the wrong type."""
    for name, written in split_names(text, "--methods", "tecoa,mmcoa:lambda_img=0.3"):
        found = _find("method", name)
        if found is not None:
            convert_all("method", name, written, found.settings, found.norm)


def check_method(text: str) -> None:
    """Raise a `UserError` if `--method` has an unknown method or setting, or a value of the wrong type."""
    split_one(text, "--method", "mmcoa:lambda_img=0.3")
    check_methods(text)


def no_budget(name: str) -> UserError:
    """Return the error for an attack that needs a budget and has none."""
    return UserError(f"attack '{name}' needs a budget: give --eps, for example --eps 1/255, or {name}:eps=1/255.")


def not_for_pairs(name: str, known: Iterable[str]) -> UserError:
    """Return the error for an attack that cannot run on image-caption pairs."""
    return UserError(f"attack '{name}' is for classification: for retrieval use one of {', '.join(sorted(known))}.")


def _find(kind: Kind, name: str) -> Signature | None:
    """Return the signature of a name; None for a plug-in of another package."""
    ours, group = signatures(kind), f"rayclip.{_GROUPS[kind]}"
    known = known_names(kind, group, ours)
    if name not in known:
        raise unknown(kind, name, known)
    return ours.get(name)


def _types(spelled: Mapping[str, str | list[str]]) -> dict[str, Any]:
    return {key: Literal[tuple(value)] if isinstance(value, list) else _PLAIN[value] for key, value in spelled.items()}


def _spelled(kind: Any) -> str | list[str]:
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return next((word for word, plain in _PLAIN.items() if kind == plain), "str")


def collect() -> dict[str, dict[str, Any]]:
    """Build the contents of `signatures.json` from the registries."""
    from rayclip.attacks import ATTACKS
    from rayclip.defenses import DEFENSES
    from rayclip.methods import METHODS
    from rayclip.models.scorers import SCORERS

    def settings(types: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _spelled(kind) for name, kind in types.items()}

    attacks = {
        name: {
            "settings": settings(kind.settings()),
            "needs_eps": kind.needs_eps,
            "for_pairs": kind.for_pairs,
            "norm": kind.default_norm(),
        }
        for name, kind in ATTACKS.items()
    }
    others: dict[str, Mapping[str, type[Configurable]]] = {"defence": DEFENSES, "scorer": SCORERS, "method": METHODS}
    rest = {
        what: {name: {"settings": settings(kind.settings())} for name, kind in kinds.items()}
        for what, kinds in others.items()
    }
    return {"attack": attacks, **rest}


if __name__ == "__main__":
    FILE.write_text(json.dumps(collect(), indent=1) + "\n")

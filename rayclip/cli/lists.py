"""`rayclip attacks`, `defenses`, `methods` and `scorers`: list them, or show one with its settings."""

import dataclasses
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayclip.cli.command import complete, read_docstring
from rayclip.cli.options import print_table
from rayclip.names import ATTACKS_ABOUT, DEFENSES_ABOUT, METHODS

if TYPE_CHECKING:
    from rayclip.names import Configurables


def _argument(known: Collection[str], group: str) -> Any:
    help_ = "Show this one, with what its settings mean.  [default: list all]"
    return typer.Argument(metavar="NAME", help=help_, autocompletion=complete(known, group))


def attacks(name: Annotated[str | None, _argument(ATTACKS_ABOUT, "attacks")] = None) -> None:
    """List the attacks for `rayclip eval --attacks`, or show one with its settings."""
    from rayclip.attacks import ATTACKS

    _show(ATTACKS, name, "commas between: --attacks clean,pgd:steps=100,step=1/255,autoattack")


def defenses(name: Annotated[str | None, _argument(DEFENSES_ABOUT, "defenses")] = None) -> None:
    """List the defences for `rayclip eval --defense`, or show one with its settings."""
    from rayclip.defenses import DEFENSES

    _show(DEFENSES, name, "commas between, + for chains: --defense none,ttc:eps=4/255,steps=2,rn+tte")


def methods(name: Annotated[str | None, _argument(METHODS, "methods")] = None) -> None:
    """List the methods for `rayclip train --method`, or show one with its settings."""
    from rayclip.methods import METHODS

    _show(METHODS, name, "one per run: --method mmcoa:lambda_img=0.3,targets=class")


def scorers(name: Annotated[str | None, _argument((), "scorers")] = None) -> None:
    """List the scorers for `rayclip eval --scorer`, or show one with its settings."""
    from rayclip.models.scorers import SCORERS

    _show(SCORERS, name, "commas between: --scorer template,cupl:captions=FILE")


def _show(kinds: "Configurables[Any]", name: str | None, example: str) -> None:
    from rayclip.settings import format_defaults, format_type

    if name is None:
        rows = []
        for each, kind in kinds.items():
            settings = " ".join(f"{k}={v}" for k, v in format_defaults(kind).items())
            rows.append((each, kinds.about(each) + (f"  [{settings}]" if settings else "")))
        print_table(rows, (kinds.kind, "what it does, and its settings"))
        print(f"\nwritten as NAME:KEY=VALUE, {example}")
        return
    kind = kinds.find(name)
    description, _ = read_docstring(inspect.getdoc(kind))
    print(f"{name}: {kinds.about(name)}\n\n{description.replace('`', '')}\n")
    defaults, meanings = format_defaults(kind), _meanings(kind)
    if not defaults:
        print("It has no settings.")
        return
    rows = [
        (f"{key}={defaults[key]}", f"{format_type(type_)}: {meanings.get(key, '')}".rstrip(": "))
        for key, type_ in kind.settings().items()
    ]
    print_table(rows, ("setting", "values, and what it means"))


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each setting."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):  # lends its settings
            found |= _meanings(field.type)
    for base in reversed(kind.__mro__):
        found |= read_docstring(base.__doc__)[1]
    return {name: meaning.replace("`", "") for name, meaning in found.items()}

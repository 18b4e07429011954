"""Write `rayclip/signatures.json` from the registries: `python -m rayclip.cli.signatures`."""

import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rayclip.attacks import ATTACKS
from rayclip.defenses import DEFENSES
from rayclip.methods import METHODS
from rayclip.models.scorers import SCORERS
from rayclip.names import FILE, PLAIN
from rayclip.settings import Configurable


def _spelled(kind: Any) -> str | list[str]:
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return next((word for word, plain in PLAIN.items() if kind == plain), "str")


def collect() -> dict[str, dict[str, Any]]:
    """Build the contents of `signatures.json` from the registries."""

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

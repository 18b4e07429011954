"""Training methods by name."""

from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

from rayclip.methods.advpt import AdvPT
from rayclip.methods.base import Method
from rayclip.methods.fare import FARE
from rayclip.methods.ft_standard import FTStandard
from rayclip.methods.mmcoa import MMCoA
from rayclip.methods.pmg_aft import PMGAFT
from rayclip.methods.saft import SAFT
from rayclip.methods.tecoa import TeCoA
from rayclip.methods.tga_zsr import TGAZSR
from rayclip.methods.vp import VP
from rayclip.types import UserError

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (FTStandard, TeCoA, PMGAFT, FARE, TGAZSR, SAFT, MMCoA, AdvPT, VP)
}


def method_class(name: str) -> type[Method]:
    """One of ours, or one that another package offers through the entry-point group `rayclip.methods`."""
    if name in METHODS:
        return METHODS[name]
    offered = {e.name: e for e in entry_points(group="rayclip.methods")}
    if name in offered:
        return offered[name].load()
    raise UserError(f"unknown method '{name}': use one of {', '.join([*METHODS, *sorted(offered)])}.")


def make_method(name: str, **settings: Any) -> Method:
    """A method with the settings that apply to it; None keeps its default, and what it does not have is left out.

    Raises:
        UserError: unknown method, or settings that it refuses.
    """
    kind = method_class(name)
    known = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in settings.items() if k in known and v is not None})

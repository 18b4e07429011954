"""Registry of training methods by name."""

from collections.abc import Sequence
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
from rayclip.names import unknown
from rayclip.settings import convert_all, settable
from rayclip.types import UserError

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (FTStandard, TeCoA, PMGAFT, FARE, TGAZSR, SAFT, MMCoA, AdvPT, VP)
}


def method_class(name: str) -> type[Method]:
    """Return the class of a built-in method, or of one that another package offers as entry point `rayclip.methods`."""
    if name in METHODS:
        return METHODS[name]
    offered = {e.name: e for e in entry_points(group="rayclip.methods")}
    if name in offered:
        return offered[name].load()
    raise unknown("method", name, [*METHODS, *sorted(offered)])


def parse_settings(name: str, written: Sequence[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` texts into a method's own settings.

    Raises:
        UserError: unknown method, a setting that it does not have, or an invalid value.
    """
    types = {k: t for k, t in settable(method_class(name)).items() if k != "text"}  # set by `--substitutes`
    parts = [text.partition("=") for text in written]
    for text, (key, _, value) in zip(written, parts, strict=True):
        if not key or not value:
            raise UserError(f"--setting '{text}' is no setting: write KEY=VALUE, as in --setting tokens=10.")
    return convert_all("method", name, {key.strip(): value.strip() for key, _, value in parts}, types)


def make_method(name: str, *, published: bool = False, **settings: Any) -> Method:
    """Return a method with the settings that apply to it; None keeps its default, and settings it does not have are
    ignored.

    Args:
        published: use the defaults of the published code (`Method.published`).

    Raises:
        UserError: unknown method, or settings that it rejects.
    """
    kind = method_class(name)
    known = {f.name for f in fields(kind)}
    given = {k: v for k, v in settings.items() if k in known and v is not None}
    return kind(**{**(kind.published if published else {}), **given})

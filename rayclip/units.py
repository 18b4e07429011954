"""Perturbation budgets: floats in pixel units [0, 1], written as fractions (`4/255`) for people."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from rayclip.types import UserError

Norm = Literal["linf", "l2"]

_MEANT_IN_255THS = 10  # whole l_2 lengths from here on are taken as units of 1/255: 128 probably means 128/255


def parse_budget(text: str, what: str = "eps", norm: Norm = "linf") -> float:
    """Parse `"4/255"`, `"0.0157"` or `"0"` as a float: in [0, 1) for l_inf, any length for l_2.

    Raises:
        UserError: not a number, negative, or 1 or more in l_inf (`8` probably means `8/255`); also whole l_2 lengths
            of 10 or more (`128` probably means `128/255`).
    """
    numerator, _, denominator = text.strip().partition("/")
    try:
        value = float(Fraction(numerator) / Fraction(denominator or 1))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"{what} '{text}' is not a number: write it as a fraction such as 4/255.") from None
    if value < 0:
        raise UserError(f"{what} '{text}' is negative: write a budget such as 4/255.")
    if norm == "l2":
        if value >= _MEANT_IN_255THS and text.strip().isdigit():
            number = text.strip()
            raise UserError(f"{what} '{text}' is an l_2 length of {number} pixels: write {number}/255, or {number}.0.")
        return value
    if value >= 1:
        hint = f"{text.strip()}/255" if "/" not in text else "4/255"
        raise UserError(f"{what} '{text}' is not in pixel units [0, 1): write {hint}.")
    return value


def parse_budgets(texts: Sequence[str], what: str = "eps") -> tuple[float, ...]:
    """Parse comma-separated budgets from one or several texts; duplicates are dropped and the order is kept."""
    parts = [part for text in texts for part in text.split(",")]
    return tuple(dict.fromkeys(parse_budget(part, what) for part in parts))


def check_budget(eps: float, norm: Norm, who: str) -> None:
    """Raise a `UserError` unless `eps` is a valid budget in pixel units: finite, not negative, below 1 in l_inf."""
    if not math.isfinite(eps) or eps < 0:
        raise UserError(f"{who} cannot have the budget {eps:g}: give a fraction such as 1/255.")
    if norm == "linf" and eps >= 1:
        raise UserError(f"{who} cannot have the budget {eps:g}, as pixels are in [0, 1]: give {eps:g}/255.")


def default_step(eps: float, steps: int, norm: Norm = "linf") -> float:
    """Return the default step size: the papers' 1/255 if `steps` such steps can cross the l_inf ball; otherwise, and
    always in l_2, 2.5·eps/steps (Madry et al. 2018)."""
    return 1 / 255 if norm == "linf" and steps / 255 >= 2 * eps else 2.5 * eps / steps


def in_255ths(value: float) -> str:
    """Format a budget in units of 1/255 without trailing zeros: `"4"`, `"0.5"`."""
    return f"{round(value * 255, 4):g}"


def format_budget(value: float) -> str:
    """Format a budget as a person would write it: `4/255`, `0.5/255`; `0` for zero."""
    return f"{in_255ths(value)}/255" if value else "0"

"""Perturbation budgets: floats in pixel units [0, 1], spelled as fractions wherever a person writes or reads them."""

from fractions import Fraction
from typing import Literal

from rayclip.types import UserError


def parse_budget(text: str, what: str = "eps") -> float:
    """`"4/255"`, `"0.0157"` or `"0"` as a float in [0, 1).

    Raises:
        UserError: not a number, negative, or a bare number of 1 or more (`8` is meant as `8/255`).
    """
    numerator, _, denominator = text.strip().partition("/")
    try:
        value = float(Fraction(numerator) / Fraction(denominator or 1))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{what} '{text}' is not a number: write it as a fraction such as 4/255.") from None
    if value < 0:
        raise UserError(f"{what} '{text}' is negative: write a budget such as 4/255.")
    if value >= 1:
        hint = f"{text.strip()}/255" if "/" not in text else "4/255"
        raise UserError(f"{what} '{text}' is not in pixel units [0, 1): write {hint}.")
    return value


def default_step(eps: float, steps: int, norm: Literal["linf", "l2"] = "linf") -> float:
    """Length of a step where none is given: the papers' 1/255; in a ball that so many of those do not cross, and in
    l_2, 2.5·eps/steps (Madry et al. 2018)."""
    return 1 / 255 if norm == "linf" and steps / 255 >= 2 * eps else 2.5 * eps / steps


def in_255ths(value: float) -> str:
    """A budget counted in units of 1/255 without needless digits: `"4"`, `"0.5"`."""
    return f"{round(value * 255, 4):g}"


def format_budget(value: float) -> str:
    """The fraction that a person would write: `4/255`, `0.5/255`; `0` for nothing."""
    return f"{in_255ths(value)}/255" if value else "0"

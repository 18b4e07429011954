"""Specifications of interpolated models, `mix:START+END@a`."""

from rayclip.types import UserError

PREFIX = "mix:"


def mix_spec(start: str, end: str, a: float) -> str:
    """Return `mix:START+END@a`, which `load_model` takes. Raises `UserError` as `parse_mix`."""
    spec = f"{PREFIX}{start}+{end}@{a:g}"
    parse_mix(spec)
    return spec


def parse_mix(spec: str) -> tuple[str, str, float]:
    """Return START, END and a of `mix:START+END@a`.

    Raises:
        UserError: the text has another form, or a is not between 0 and 1.
    """
    ends, separator, number = spec.removeprefix(PREFIX).rpartition("@")
    try:
        a = float(number)
    except ValueError:
        separator = ""
    if not separator or ends.count("+") != 1 or not all(ends.split("+")):
        raise UserError(
            f"'{spec}' is no interpolation: write mix:START+END@0.5, with two models whose names hold no + and a "
            "number from 0 (START) to 1 (END)."
        )
    if not 0 <= a <= 1:
        raise UserError(f"'{spec}': {number} is not from 0 (the start) to 1 (the end).")
    start, end = ends.split("+")
    return start, end, a

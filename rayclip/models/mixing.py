"""Weight interpolation between a model and its fine-tuned version: `θ(a) = (1-a)·θ₀ + a·θ_ft` (MMCoA, figure 8)."""

from typing import Any

import torch
from torch import Tensor

from rayclip.models.clip import Clip, load_model
from rayclip.models.prompts import Prompted
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


def load_mix(spec: str, device: torch.device | str = "cpu") -> Clip:
    """Load the model of a `mix:` specification, in fp32. At a = 0 and a = 1 its weights equal that end's, bit for bit.

    Raises:
        UserError: what `parse_mix` and `load_model` raise, or two models of different architecture.
    """
    first, second, a = parse_mix(spec)
    start, end = load_model(first, device), load_model(second, device)
    for name, clip in ((first, start), (second, end)):
        if isinstance(clip, Prompted):
            raise UserError(f"'{spec}': {name} is a learned prompt, whose model has the weights that it had before.")
    if _architecture(start) != _architecture(end):
        raise UserError(
            f"'{spec}': {first} and {second} differ in architecture, activation or preprocessing; only a model and "
            "what was fine-tuned from it can be interpolated."
        )
    mixed = end if a == 1 else start
    if 0 < a < 1:
        theta_0, theta_ft = start.model.state_dict(), end.model.state_dict()
        mixed.model.load_state_dict({name: interpolate(theta_0[name], theta_ft[name], a) for name in theta_0})
    mixed.spec = spec
    return mixed


def interpolate(start: Tensor, end: Tensor, a: float) -> Tensor:
    """Return `(1-a)·start + a·end`, any shape; counters (integers) stay those of the start."""
    return (1 - a) * start + a * end if start.is_floating_point() else start


def _architecture(clip: Clip) -> list[Any]:
    """Return a description that is equal for models whose weights have the same meaning, however their configurations
    are written."""
    return [
        [(name, tensor.shape) for name, tensor in clip.model.state_dict().items()],
        [(type(module).__name__, getattr(module, "num_heads", None)) for module in clip.model.modules()],
        clip.image_size,
        clip.mean.tolist(),
        clip.std.tolist(),
    ]

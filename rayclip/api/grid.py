"""Grids of trainings as people write them: values of options and of methods' settings, their combinations and names.

Imports no torch, so that a command line can be checked at once.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from rayclip.names import METHODS, check_attacks, check_method, signatures
from rayclip.paths import split_places
from rayclip.settings import FromZero, convert, format_name, split_names, suggest
from rayclip.types import Ranking, UserError
from rayclip.units import format_budget, parse_budget, parse_budgets

Shots = Annotated[int, "or full"]  # images per class
# Options of training that take several values, as `rayclip train` has them
OPTIONS: dict[str, Any] = {
    "model": str,
    "data": str,
    "attack": str,
    "eps": float,
    "steps": int,
    "step_size": float,
    "norm": Literal["linf", "l2"],
    "start": Literal["random", "zero"],
    "shots": Shots,
    "trains": str,
    "recipe": Literal["paper", "small"],
    "epochs": int,
    "lr": float,
    "batch_size": int,
    "optimizer": Literal["sgd", "adam", "adamw"],
    "momentum": float,
    "betas": tuple[float, float],
    "weight_decay": float,
    "schedule": Literal["cosine", "linear", "constant"],
    "warmup_steps": FromZero,
    "eps_warmup": float,
    "ema": float,
    "accumulate": int,
    "precision": Literal["auto", "fp32", "bf16"],
    "seed": FromZero,
}
MANY = 100  # trials; more are not begun without being confirmed
_MOST = 10_000  # trials; more are not made at all
_BUDGETS = ("eps", "step_size")
_AT_MOST_1 = ("momentum", "ema")
_TRIES = 100  # draws per sample until a search gives up looking for new ones


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Settings that the trials of a sweep share, and the tests of their results.

    Attributes:
        test: Test data, commas between. [default: the test part of --data; of a .parquet file a fifth is held out]
        attacks: Attacks on the results, with settings: clean,pgd:steps=100,bert.
        test_eps: Budgets of these attacks, commas between. [default: those of the trainings]
        limit: Test at most this many images of each data set.
        search: Draw --samples combinations: train all to their end (random), or stop those that fall behind (asha).
            They are compared on a fifth of the training data that is held out; only the best are tested.
        samples: Combinations that a search draws.
        by: What a search looks for: worst case, clean, or mean of the two, in accuracy.
        reduction: One in this many trials passes each rung of asha: after 1 epoch, this many, its square, …
        models: Checkpoints that sweeps share: what one has trained another does not. [default: OUT/models]
    """

    test: Sequence[str] = ()
    attacks: Sequence[str] = ("clean,pgd",)
    test_eps: Sequence[str] = ()
    limit: int | None = None
    substitutes: str = "default"
    resolution: Literal["native", "model"] = "native"
    resize: Literal["antialias", "plain"] = "antialias"
    class_names: str = "curated"
    search: Literal["asha", "random"] | None = None
    samples: int = 16
    by: Ranking = "worst case"
    reduction: float = 3.0
    models: str | None = None

    def __post_init__(self) -> None:
        check_attacks(",".join(self.attacks), has_budget=True)
        parse_budgets(self.test_eps, "test-eps")
        for name in ("samples", "limit"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"--{name} {number} must be at least 1.")
        if not self.reduction > 1:
            raise UserError(f"--reduction {self.reduction:g} must be more than 1: 3 lets a third pass each rung.")


class Range(NamedTuple):
    """Numbers that a search draws from, written `LOW..HIGH`: log-uniform if HIGH is ten times LOW or more, else
    uniform; whole ones if `whole`."""

    low: float
    high: float
    whole: bool = False

    def at(self, share: float) -> float:
        """Return the number at this share (0..1) of the range, to three digits."""
        if 0 < 10 * self.low <= self.high:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return round(value) if self.whole else float(f"{value:.3g}")


Values = list[Any] | Range


class Point(NamedTuple):
    """One combination: a method, its settings as text, and options of training as values."""

    method: str
    settings: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The method with its settings, as people write it."""
        return format_name(self.method, self.settings)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Everything that a sweep varies.

    Attributes:
        methods: each with the values of its settings, as text.
        options: the values of options of training, by name (`OPTIONS`).
    """

    methods: Sequence[tuple[str, Mapping[str, Values]]]
    options: Mapping[str, Values]

    @classmethod
    def read(
        cls, methods: str | Sequence[str], options: Mapping[str, Any], *, seeds: int = 1, option: str = "--method"
    ) -> "Grid":
        """Read methods (`mmcoa:lambda_img=0.1|0.5`, `tecoa,fare`) and options: a value, several, or texts (`1,5,full`).

        Args:
            seeds: number of seeds, counted from the one in the options, or 0.
            option: that has the methods, for messages.

        Raises:
            UserError: no or an unknown method, setting or option, or a value that does not parse.
        """
        texts = [methods] if isinstance(methods, str) else list(methods)
        if not "".join(texts).strip():
            raise UserError(f"the grid is empty: name a method, as in {option} tecoa.")
        for name in options:
            if name not in OPTIONS:
                raise UserError(
                    f"unknown training option '{name}': {suggest(name, OPTIONS)}use one of {', '.join(OPTIONS)}."
                )
        values = {name: _read_option(name, options[name]) for name in OPTIONS if name in options}
        if seeds > 1:
            first = values.get("seed", [0])
            if isinstance(first, Range) or len(first) > 1:
                raise UserError(f"--seeds {seeds} counts from one --seed: write one, or all of them in --seed alone.")
            values["seed"] = [first[0] + number for number in range(seeds)]
        return cls(methods=_read_methods(texts, option), options=values)

    @property
    def size(self) -> float:
        """The number of combinations; infinite if a range is among the values."""

        def count(values: Iterable[Values]) -> float:
            return math.prod(math.inf if isinstance(each, Range) else len(each) for each in values)

        return sum(count(settings.values()) for _, settings in self.methods) * count(self.options.values())

    def points(self) -> list[Point]:
        """Return all combinations, the last option varying fastest. Raise a `UserError` if there is a range, or if they
        are far too many."""
        self.check_values()
        return [
            Point(
                name,
                dict(zip(settings, chosen, strict=False)),
                dict(zip(self.options, chosen[len(settings) :], strict=True)),
            )
            for name, settings in self.methods
            for chosen in itertools.product(*settings.values(), *self.options.values())
        ]

    def check_values(self) -> None:
        """Raise a `UserError` if the combinations cannot be listed: a range is among the values, or they are far too
        many."""
        for _, settings in self.methods:
            for key, values in [*settings.items(), *((option_name(k), v) for k, v in self.options.items())]:
                if isinstance(values, Range):
                    raise UserError(
                        f"{key} is a range, {values.low:g}..{values.high:g}, which only a search draws from: add "
                        "--search random or --search asha, or write values."
                    )
        if self.size > _MOST:
            raise UserError(f"the grid has {self.size:,} combinations: draw some of them with --search random.")

    def draw(self, samples: int, seed: int) -> list[Point]:
        """Return so many random combinations without repetition, or all if there are not more. Equal for equal seeds,
        and more samples begin with fewer."""
        if self.size <= samples:
            return self.points()
        rng = random.Random(seed)
        found: dict[str, Point] = {}

        def pick(values: Values) -> Any:
            share = rng.random()
            return values.at(share) if isinstance(values, Range) else values[int(share * len(values))]

        for _ in range(_TRIES * samples):
            name, settings = self.methods[int(rng.random() * len(self.methods))]
            written = {key: str(pick(values)) for key, values in settings.items()}
            point = Point(name, written, {key: pick(values) for key, values in self.options.items()})
            found.setdefault(repr(point), point)
            if len(found) == samples:
                break
        return list(found.values())


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_methods(texts: Sequence[str], option: str) -> list[tuple[str, dict[str, Values]]]:
    found: list[tuple[str, dict[str, Values]]] = []
    for name, written in split_names(",".join(texts), option, "mmcoa:lambda_img=0.1|0.5"):
        check_method(name)
        ours = signatures("method")
        types = ours[name].settings if name in METHODS else dict.fromkeys(written, str)
        values: dict[str, Values] = {}
        for key, text in written.items():
            others = [other for other in ours if key in ours[other].settings]
            if key not in types and others:
                raise UserError(
                    f"method '{name}' has no setting '{key}', which {', '.join(others)} has: leave it away."
                )
            if key not in types:
                check_method(f"{name}:{key}={text}")  # which says so
            values[key] = _read_setting(f"{name}:{key}=", key, text, types[key])
        found.append((name, values))
    return found


def _read_setting(what: str, key: str, text: str, kind: Any) -> Values:
    parts = [part.strip() for part in text.split("|")]
    if "" in parts:
        raise UserError(f"{what}{text} has an empty alternative: write values with | between.")
    between = _read_range(text, kind, lambda end: convert(what, key, end, kind))
    if between is None:
        for part in parts:
            convert(what, key, part, kind)
    return between or list(dict.fromkeys(parts))


def _read_option(name: str, written: Any) -> Values:
    """Return the values of an option: `written` is one, several, or texts. Equal ones count once."""
    pair, option = name == "betas", option_name(name)
    one = isinstance(written, str | int | float | Range) or (pair and isinstance(written, tuple))
    found: list[Any] = []
    places = name in ("model", "data")  # which may hold commas
    if places:
        found = split_places(written) if isinstance(written, str) else list(written)
    for each in [] if places else [written] if one else written:
        if isinstance(each, Range):
            found.append(each)
            continue
        if not isinstance(each, str):
            each = "full" if each is None else ",".join(map(str, each)) if isinstance(each, tuple) else str(each)
        parts = each.split("|" if pair or "|" in each else ",")
        if name == "trains" and "|" not in each:  # a part of the model may have settings
            parts = [format_name(*one) for one in split_names(each, option, "image,last-2")]
        for part in parts:
            if not part.strip():
                raise UserError(f"{option} '{each}' has an empty value: write values with commas between.")
            between = _read_range(part, OPTIONS[name], lambda text: _read_value(name, text))
            found.append(between or _read_value(name, part.strip()))
    if not found:
        raise UserError(f"{option} has no value, and the grid would be empty: write one, or leave it away.")
    if isinstance(found[0], Range) and len(found) == 1:
        return found[0]
    if any(isinstance(value, Range) for value in found):
        raise UserError(f"{option} has a range beside other values: write one range, or values.")
    return list(dict.fromkeys(found))


def _read_value(name: str, text: str) -> Any:
    kind, option = OPTIONS[name], option_name(name)
    if kind == Shots:
        return parse_shots(text)
    if name in _BUDGETS:
        return parse_budget(text, option[2:])
    if name == "betas":
        pair = [convert(f"{option} ", name, part, float) for part in text.split(",")]
        if len(pair) != 2 or not all(0 <= value < 1 for value in pair):
            raise UserError(f"{option} '{text}' are not two numbers from 0 to below 1: write 0.9,0.98.")
        return tuple(pair)
    value = convert(f"{option} ", name, text, kind)
    if kind is float and not (name != "lr" and value == 0) and not 0 < value <= (1 if name in _AT_MOST_1 else math.inf):
        must = "a positive number" if name == "lr" else "from 0 to 1" if name in _AT_MOST_1 else "at least 0"
        raise UserError(f"{option} {text} must be {must}.")
    return value


def parse_shots(text: str) -> int | None:
    """Parse a number of shots; `full` is None."""
    if text == "full":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--shots '{text}' is neither a number of images per class nor full: write 1, 5 or full.")
    return int(text)


def _read_range(text: str, kind: Any, parse: Any) -> Range | None:
    """Return the range that a text names, if its kind is a number; `parse` reads its ends."""
    low, dots, high = text.partition("..")
    number = kind in (int, float, FromZero, Shots)
    if not dots or not number:
        return None
    ends = parse(low.strip()), parse(high.strip())
    if None in ends or not ends[0] < ends[1]:
        raise UserError(f"'{text}' is no range: write the lower number first, as in 0.1..0.9.")
    return Range(*ends, whole=kind is not float)


def name_points(points: Sequence[Point], *, without: Iterable[str] = ()) -> list[str]:
    """Return display names that say what differs only: `mmcoa λ_img 0.1, eps 2/255, 5 shots, seed 1`.

    A setting is named where it differs among the points of the method, an option where it differs among all.

    Args:
        without: options that are left away, so that points which differ in no other have one name.
    """
    shown = {name: _name_values(name, {p.options[name]: None for p in points if name in p.options}) for name in OPTIONS}
    names = []
    for point in points:
        alike = [p for p in points if p.method == point.method]
        settings = [
            f"{key.replace('lambda', 'λ')} {value}"
            for key, value in point.settings.items()
            if len({p.settings.get(key) for p in alike}) > 1
        ]
        options = [
            shown[key][value] for key, value in point.options.items() if key not in without and len(shown[key]) > 1
        ]
        names.append(", ".join([" ".join([point.method, *settings[:1]]), *settings[1:], *options]))
    return names


def _name_values(name: str, values: Iterable[Any]) -> dict[Any, str]:
    """Return what stands for each value of an option in names: short, but different for different values."""
    shown = {value: _name_value(name, value) for value in values}
    return shown if len(set(shown.values())) == len(shown) else {value: f"{name} {value}" for value in shown}


def _name_value(key: str, value: Any) -> str:
    if key == "shots":
        return "all images" if value is None else f"{value} shot{'s' if value > 1 else ''}"
    if key in ("model", "data"):
        value = Path(value).stem if value.endswith(".parquet") else value
    elif key in _BUDGETS:
        value = format_budget(value)
    elif isinstance(value, tuple):
        value = " and ".join(f"{each:g}" for each in value)
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"{'batch' if key == 'batch_size' else key.replace('_', ' ')} {value}"

"""The trade-off figure: robust against clean accuracy, with the Pareto front."""

import itertools
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas

from rayclip.evaluation.front import pareto_front
from rayclip.models.mixing import parse_mix
from rayclip.reports.figures.style import INK, MARKERS, MUTED, PAPER, SERIES, accuracy_axis, short, where
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.section import Number, Section, Subject

_TYPE = 8.0  # font size of the names
_CROWD = 12  # beyond this many points, draw no whiskers and few names
_OFFSETS = tuple(  # offsets of a name from its data point in typographic points, nearest first
    (dx * far, dy * far)
    for far in (8, 13)
    for dx, dy in ((1, 0), (-1, 0), (0, 1.2), (0, -1.2), (1, 1), (-1, 1), (1, -1), (-1, -1))
)
Box = tuple[float, float, float, float]


def tradeoff(section: Section) -> list[Figure]:
    """Return the figure: a point per model, the Pareto front, and a curve through interpolations of two models."""
    clean, robust = section.clean, section.main
    if clean is None or robust.kind == "clean":
        return []
    unharmed, harmed = (section.ranked(section.overall, attack) for attack in (clean, robust))
    points = {s: (unharmed[s], harmed[s]) for s in section.subjects if s in unharmed and s in harmed}
    if len(points) < 2:
        return []
    crowded = len(points) > _CROWD
    on_front = pareto_front([(c.top1, r.top1) for c, r in points.values()])
    front = sorted(itertools.compress(points, on_front), key=lambda s: points[s][0].top1)
    curves = interpolations(list(points))
    methods = list(dict.fromkeys(s.model.method for s in points if s.model.method is not None))

    def draw(columns: int) -> Canvas:
        canvas = Canvas(figsize=(6.4, 4.6) if columns > 1 else (4.2, 4.2))
        ax = canvas.subplots()
        corners = [(points[s][0].top1, points[s][1].top1) for s in front]
        ax.step(*zip(*corners, strict=True), where="pre", color=MUTED, linestyle="--", linewidth=1.2, zorder=1)
        for i, members in enumerate(curves.values()):
            line = [(points[s][0].top1, points[s][1].top1) for s in members]
            ax.plot(*zip(*line, strict=True), color=SERIES[-1 - i % len(SERIES)], linewidth=1.4)
        keys: dict[str, Any] = {}
        for i, (subject, (c, r)) in enumerate(points.items()):
            colour, marker = _look(subject, methods, curves)
            hollow = subject.defense != "none"
            drawn = ax.errorbar(
                c.top1,
                r.top1,
                xerr=None if crowded else _arms(c),
                yerr=None if crowded else _arms(r),
                color=colour,
                marker=marker,
                markersize=(10 if marker == "*" else 7) - 1.5 * crowded,
                markerfacecolor=PAPER if hollow else colour,
                markeredgecolor=colour if hollow else PAPER,
                markeredgewidth=1.2 if hollow else 0.6,
                ecolor=(*to_rgb(colour), 0.3),
                elinewidth=1.0,
                linestyle="none",
                zorder=3 + i / 1000,
                clip_on=False,
            )
            if not hollow:
                keys.setdefault(_kind(subject), drawn[0])
        accuracy_axis(ax, "x", f"clean accuracy in % ({where(section)})")
        accuracy_axis(ax, "y", f"{heading(robust.label)} accuracy in %")
        first = sorted(points, key=lambda s: (s not in front, s.model.method is not None, -points[s][1].top1))
        if crowded:
            canvas.legend(
                [*keys.values()],
                [*keys],
                loc="outside upper left",
                ncols=5 if columns > 1 else 2,
                frameon=False,
                fontsize=8.5,
            )
            first = [s for s in first if s in front or s.is_untouched]
        _name(ax, [(points[s][0].top1, points[s][1].top1, short(s.name)) for s in first])
        return canvas

    more = "" if crowded else " Whiskers are 95 % intervals."
    more += " Lines join models whose weights lie between two others." if curves else ""
    more += " Hollow: behind a defence." if any(s.defense != "none" for s in points) else ""
    more += " Named are those on the front and the untouched." if crowded else ""
    fewer = sum(section.partial(s, section.overall, robust) for s in section.subjects if s not in points)
    more += f" {fewer} that fewer attacks were tried on are not here." if fewer else ""
    return [
        Figure(
            name="tradeoff",
            title=f"Clean against robust accuracy, {where(section)}",
            caption=f"Dashed: the Pareto front; no model is better at both than one on it.{more}",
            alt=f"{len(points)} models as points, clean accuracy to the right, {heading(robust.label)} accuracy "
            f"upward. On the Pareto front: {', '.join(s.name for s in front)}.",
            draw=draw,
            narrows=True,
        )
    ]


def interpolations(subjects: list[Subject]) -> dict[tuple[str, str, str, str], list[Subject]]:
    """Return models `mix:START+END@a` with their two ends in order of a, by (start, end, scorer, defence)."""
    found: dict[tuple[str, str, str, str], dict[float, Subject]] = {}
    for subject in subjects:
        if subject.model.is_mix:
            start, end, a = parse_mix(subject.model.spec)
            found.setdefault((start, end, subject.scorer, subject.defense), {})[a] = subject
    for (start, end, scorer, defense), members in found.items():
        for subject in subjects:
            if (subject.scorer, subject.defense) == (scorer, defense):
                members.setdefault({start: 0.0, end: 1.0}.get(subject.model.spec, 2.0), subject)
        members.pop(2.0, None)
    return {key: [m for _, m in sorted(members.items())] for key, members in found.items() if len(members) > 1}


def _kind(subject: Subject) -> str:
    """Return a subject's legend entry."""
    if subject.model.is_mix:
        return "between two models"
    return subject.model.method or "untouched"


def _look(
    subject: Subject, methods: list[str], curves: dict[tuple[str, str, str, str], list[Subject]]
) -> tuple[str, str]:
    """Return a subject's colour and marker: those of its interpolation curve, else those of its method."""
    for i, members in enumerate(curves.values()):
        if subject in members and subject.model.is_mix:
            return SERIES[-1 - i % len(SERIES)], MARKERS[-1 - i % len(MARKERS)]
    if subject.model.method is None:
        return INK, "*"
    i = methods.index(subject.model.method) % len(SERIES)
    return SERIES[i], MARKERS[i]


def _arms(number: Number) -> list[list[float]]:
    return [[number.top1 - number.low], [number.high - number.top1]]


def _name(ax: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write a name beside each point where it covers no other point or name, and leave it out if it fits nowhere.

    `points` are ordered by importance; names that are left out are in the tables.
    """
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]  # positions depend on the layout
    scale = 72 / ax.figure.dpi  # pixels to typographic points
    places = [tuple(ax.transData.transform((x, y)) * scale) for x, y, _ in points]
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in places]
    frame = ax.get_window_extent()
    low, high = frame.y0 * scale, frame.y1 * scale
    for (x, y, name), (px, py) in zip(points, places, strict=True):
        width, height = 0.62 * _TYPE * len(name), 1.25 * _TYPE
        for dx, dy in _OFFSETS:
            left = px + dx if dx > 0 else px + dx - width if dx < 0 else px - width / 2
            box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
            inside = box[0] > frame.x0 * scale and box[1] > low and box[3] < high + height
            if inside and not any(_overlap(box, other) for other in taken):
                side: Literal["left", "right", "center"] = "left" if dx > 0 else "right" if dx < 0 else "center"
                ax.annotate(
                    name,
                    (x, y),
                    xytext=(dx, dy),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    fontsize=_TYPE,
                    color=INK,
                    annotation_clip=False,
                    zorder=5,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
                )
                taken.append(box)
                break


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]

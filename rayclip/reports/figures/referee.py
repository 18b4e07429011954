"""The referee's figure: the gain of each defence as papers claim it, against what is left of it."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rayclip.reports.figures.style import INK, MARKERS, MUTED, SERIES, panels, shorten, whiskers
from rayclip.reports.grid import Figure, format_signed
from rayclip.reports.referee import Hearing, Ruling, row_names
from rayclip.reports.section import Number

_GAP = 0.062  # between two names, as a share of the height
_PAD = 5.0  # points around the data


def referee(hearings: Sequence[Hearing]) -> list[Figure]:
    """Return a figure for each hearing; of several data sets, of their average alone."""
    averaged = {(id(h.section), h.ball) for h in hearings if len(h.section.datasets) > 1 and h.data == "average"}
    shown = [h for h in hearings if h.data == "average" or (id(h.section), h.ball) not in averaged]
    return [_figure(hearing, f"-{i}" if i else "") for i, hearing in enumerate(shown)]


def _figure(hearing: Hearing, suffix: str) -> Figure:
    models: dict[str, list[tuple[str, Number, Number]]] = {}
    for ruling, name in zip(hearing.rulings, row_names(hearing.rulings).values(), strict=True):
        model, _, defense = name.rpartition(" + ")
        if ruling.claimed is not None and ruling.left is not None:
            models.setdefault(model, []).append((defense, ruling.claimed, ruling.left))
    names = list(dict.fromkeys(name for points in models.values() for name, _, _ in points))
    numbers = [number for points in models.values() for _, *both in points for number in both]
    low, high = min(0.0, *(x.low for x in numbers)) - _PAD, max(0.0, *(x.high for x in numbers)) + _PAD

    def draw(columns: int) -> Canvas:
        canvas, axes = panels(len(models), min(columns, 2), width=4.3, height=4.0, share_x=False, share_y=False)
        for ax, (model, points) in zip(axes, models.items(), strict=True):
            ax.plot([low, high], [low, high], color=MUTED, linestyle="--", linewidth=1.0, zorder=1)
            ax.axhline(0, color=INK, linewidth=0.8, zorder=1)
            ax.axvline(0, color=INK, linewidth=0.8, zorder=1)
            for name, claimed, left in points:
                i = names.index(name)
                ax.errorbar(
                    claimed.top1,
                    left.top1,
                    xerr=whiskers(claimed),
                    yerr=whiskers(left),
                    color=SERIES[i % len(SERIES)],
                    marker=MARKERS[(i + i // len(SERIES)) % len(MARKERS)],
                    markersize=6,
                    elinewidth=0.8,
                    linestyle="none",
                    zorder=3,
                )
            _name(ax, [(name, c.top1, left.top1, names.index(name)) for name, c, left in points], low, high)
            ax.set(xlim=(low, high), ylim=(low, high), title=shorten(model))
        for ax in axes:
            ax.set_xlabel("claimed: gain under attacks that\nignore the defence, in points")
        axes[0].set_ylabel("left: gain under all attacks, in points")
        return canvas

    kept = [name for points in models.values() for name, _, left in points if left.low > 0]
    most = max((r for r in hearing.rulings if r.claimed), key=_claimed)
    return Figure(
        name=f"referee{suffix}",
        title=f"Claimed gain against what is left: {hearing.title}",
        caption="A point per defence, with 95 % intervals. On the dashed line all of the gain is left; on the level "
        f"one nothing. The interval is above it for: {', '.join(dict.fromkeys(kept)) or 'none'}; a stronger attack may "
        "lower any point.",
        alt=f"{sum(map(len, models.values()))} defended models as points: their gain under attacks that ignore the "
        f"defence to the right, at most {format_signed(_claimed(most))} points, and under all attacks upward.",
        draw=draw,
        narrows=True,
    )


def _claimed(ruling: Ruling) -> float:
    return ruling.claimed.top1 if ruling.claimed is not None else 0.0


def _name(ax: Axes, points: Sequence[tuple[str, float, float, int]], low: float, high: float) -> None:
    """Write the names beside the panel in the order of the points' heights, a line from each to its point."""
    gap, span = _GAP * (high - low), high - low
    ordered = sorted(points, key=lambda point: point[2])
    places: list[float] = []
    for _, _, y, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else y)
    lifted = sum(place - point[2] for place, point in zip(places, ordered, strict=True)) / len(places)
    places = [max(place - lifted, low + gap * (i + 0.5)) for i, place in enumerate(places)]
    over = max(0.0, places[-1] - (high - gap / 2))
    for i in reversed(range(len(places))):
        most = high - gap / 2 if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], most) if over else places[i]
    for (name, x, y, i), place in zip(ordered, places, strict=True):
        ax.annotate(
            name,
            xy=(x, y),
            xytext=(high + 0.03 * span, place),
            color=SERIES[i % len(SERIES)],
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": SERIES[i % len(SERIES)], "alpha": 0.35, "linewidth": 0.7},
        )

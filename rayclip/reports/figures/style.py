"""The common style of all figures, and writing them to files or into a page.

Colours are Okabe and Ito's, darkened to a contrast of at least 4.5 on white; every series also has its own marker, so
that nothing depends on colour alone. In dark mode a page gives the same colour names lighter values
(`static/page.css`).
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.transforms import offset_copy

from rayclip.reports.grid import Figure
from rayclip.reports.results import JudgedCell
from rayclip.reports.section import AVERAGE, Attack, Section, Subject
from rayclip.store import Store

INK, MUTED, GRID, PAPER = "#1b1f24", "#57606a", "#e3e7eb", "#ffffff"
SERIES = ("#0072b2", "#c44e00", "#007d5c", "#a4447d", "#8a6500", "#3f4a55", "#b0003a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RIGHT, WRONG = SERIES[2], SERIES[1]
COLUMNS = 3  # panels side by side
_ASKED = 4  # maximum number of models to look for files of; on an object store each is a request
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(SERIES, 1)}
_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": "cycler('color', ['#0072b2'])",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.09,
    "image.interpolation": "nearest",
}


def style() -> Any:
    """Return the context manager to draw figures in."""
    return rc_context(_RC)


def panels(
    count: int, columns: int, *, width: float = 3.0, height: float = 2.6, share_x: bool = True, share_y: bool = True
) -> tuple[Canvas, list[Axes]]:
    """Return a canvas with `count` axes in rows of at most `columns`; width and height per panel in inches.

    Axes that the panels share are labelled at the left and below.
    """
    across = min(count, columns)
    down = -(-count // across)
    canvas = Canvas(figsize=(max(4.2, width * across), height * down))
    axes = list(canvas.subplots(down, across, squeeze=False, sharex=share_x, sharey=share_y).flat)
    for spare in axes[count:]:
        spare.remove()
    for lowest in axes[count - across : count]:  # a spare place may be below it
        lowest.xaxis.set_tick_params(labelbottom=True)
    return canvas, axes[:count]


def accuracy_axis(axis: Axis, label: str = "") -> None:
    """Let an axis go from 0 to 100 %."""
    axis.axes.set(**{f"{axis.axis_name}lim": (0, 100)})  # type: ignore[arg-type]
    axis.set_ticks(range(0, 101, 20))
    axis.set_label_text(label)


@dataclass(frozen=True)
class End:
    """The right end of a line, with its name; a line without a marker is dotted."""

    x: float
    y: float
    name: str
    colour: str
    marker: str = ""


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Label the right ends of lines with names and markers, moved apart where they would touch."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end.y)
    right = max((end.x for end in ends), default=0.0)
    places = apart([end.y for end in ends], 0.085 * (high - low), high)
    beside = offset_copy(axes.transData, axes.figure, x=12, units="points")  # type: ignore[arg-type]
    for end, at in zip(ends, places, strict=True):
        if end.marker:
            look = {"s": 16, "color": end.colour, "marker": end.marker, "linewidths": 0}
            axes.scatter([right], [at], transform=beside, clip_on=False, **look)
        axes.annotate(
            end.name,
            (right, at),
            xytext=(18, 0),
            textcoords="offset points",
            va="center",
            color=end.colour,
            fontsize=8.5,
            annotation_clip=False,
        )


def apart(values: Sequence[float], gap: float, high: float) -> list[float]:
    """Move ascending values apart to distances of at least `gap`, below `high`; clusters keep their centre."""
    crowds: list[tuple[float, int]] = []  # (centre, size) of each cluster
    for value in values:
        middle, count = value, 1
        while crowds and crowds[-1][0] + gap * (crowds[-1][1] + count) / 2 > middle:
            before, many = crowds.pop()
            middle = (before * many + middle * count) / (many + count)
            count += many
        crowds.append((middle, count))
    found = [middle + gap * (i - (count - 1) / 2) for middle, count in crowds for i in range(count)]
    for i in reversed(range(len(found))):
        found[i] = min(found[i], high - gap * (len(found) - 1 - i))
    return found


def short(name: str, length: int = 28) -> str:
    """Cut the middle out of a name that is too long: names of models differ at their ends."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - tail - 1]}…{name[-tail:]}"


def few(section: Section, most: int) -> list[Subject]:
    """Return at most `most` subjects to draw, in their order: an untouched one and the best."""
    chosen = by_interest(section)[:most]
    return [s for s in section.subjects if s in chosen]


def by_interest(section: Section) -> list[Subject]:
    """Sort subjects: an untouched model first, the others by the accuracy that models are ranked by, best first."""
    found = section.ranked(section.overall, section.main)
    untouched = [s for s in section.subjects if s.is_untouched][:1]
    others = [s for s in section.subjects if s not in untouched]
    return untouched + sorted(others, key=lambda s: found[s].top1 if s in found else -1.0, reverse=True)


def where(section: Section) -> str:
    return f"average of {len(section.datasets)} data sets" if section.overall == AVERAGE else section.overall


def left_out(section: Section, subjects: Sequence[Subject]) -> str:
    more = len(section.subjects) - len(subjects)
    return f" {more} more models are in the tables." if more else ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A cell of which the evaluation kept examples."""

    subject: Subject
    dataset: str
    attack: Attack
    cell: JudgedCell


def choose_examples(section: Section, kinds: Sequence[str], has: Callable[[JudgedCell], bool]) -> list[Example]:
    """Choose what to show: an untouched model and the best one, on one data set, under one attack.

    The attack is the strongest, of the first of these kinds of attack, for which the evaluation kept examples of both;
    where there is none of both, examples of one model are returned.

    Args:
        has: whether a cell has the examples to be shown.
    """
    best: list[Example] = []
    attacks = [a for kind in kinds for a in reversed(section.attacks) if a.kind == kind]
    interesting = by_interest(section)
    for subjects in (interesting[:2], interesting[:_ASKED]):
        for attack in attacks:
            for dataset in section.datasets:
                found = [
                    Example(subject=subject, dataset=dataset, attack=attack, cell=entry.cells[0])
                    for subject in subjects
                    if (entry := section.get(subject, dataset, attack)) is not None and has(entry.cells[0])
                ]
                if len(found) >= min(2, len(subjects)):
                    return found[:2]
                best = best or found
    return best


def as_svg(figure: Figure) -> str:
    """Render a figure as `<svg>` with real text and with colours from the page; one with panels also for a narrow page,
    where they are below one another."""
    across = _svg(figure, COLUMNS, figure.name)
    if not figure.stacks:
        return across
    narrow = _svg(figure, 1, f"{figure.name}-narrow")
    return f'<div class="narrow">{narrow}</div><div class="across">{across}</div>'


def _svg(figure: Figure, columns: int, name: str) -> str:
    svg = _bytes(figure, "svg", {"svg.fonttype": "none"}, columns, transparent=True).decode()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans'")
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def write_figure(figure: Figure, folder: Path) -> dict[str, Path]:
    """Write a figure as SVG, PDF and PNG below `folder`, each atomically; return the paths by file ending."""
    store = Store(str(folder.absolute()))
    paths = {}
    for form in ("svg", "pdf", "png"):
        name = f"{figure.name}.{form}"
        store.write(name, _bytes(figure, form, {"svg.fonttype": "path"}, COLUMNS))
        paths[form] = store.path(name)
    return paths


def _bytes(figure: Figure, form: str, rc: dict[str, Any], columns: int, *, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with style(), rc_context({**rc, "svg.hashsalt": figure.name}):
        canvas = figure.draw(columns)
        canvas.savefig(
            buffer,
            format=form,
            dpi=200,
            bbox_inches="tight",
            pad_inches=0.05,
            transparent=transparent,
            metadata=dates[form],
        )
    return buffer.getvalue()


def decode(png: bytes) -> np.ndarray:
    """Decode an image file into an array of pixels."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))

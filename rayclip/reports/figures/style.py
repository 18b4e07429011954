"""The common style of all figures, and writing them to files or into a page.

Colours are Okabe and Ito's, darkened to a contrast of at least 4.5 on white; every series also has its own marker, so
that nothing depends on colour alone. In dark mode a page gives the same colour names lighter values
(`static/page.css`).
"""

import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.style import context

from rayclip.reports.grid import Figure
from rayclip.reports.section import AVERAGE, Number, Section, Subject
from rayclip.store import Store

INK, MUTED, GRID, PAPER = "#1b1f24", "#57606a", "#e3e7eb", "#ffffff"
SERIES = ("#0072b2", "#c44e00", "#007d5c", "#a4447d", "#8a6500", "#3f4a55", "#b0003a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RIGHT, WRONG = SERIES[2], SERIES[1]
COLUMNS = 3  # panels side by side
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(SERIES, 1)}


def style() -> Any:
    """Return the context manager to draw figures in."""
    return context(resources.files("rayclip.reports") / "static" / "figures.mplstyle")


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


def legend(canvas: Canvas, keys: Mapping[str, Any], columns: int, *, place: str = "outside lower left") -> None:
    """Name what is drawn, beside the panels."""
    canvas.legend([*keys.values()], [*keys], loc=place, ncols=columns, frameon=False, fontsize=8.5)


def hide_axes(axes: Axes) -> None:
    """Leave nothing of a panel but what is drawn in it."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def whiskers(number: Number) -> list[list[float]]:
    """Return how far the interval reaches below and above, as `errorbar` takes it."""
    return [[number.top1 - number.low], [number.high - number.top1]]


def accuracy_axis(axes: Axes, which: Literal["x", "y"], label: str = "") -> None:
    """Let an axis go from 0 to 100 %."""
    axes.set(**{f"{which}lim": (0, 100), f"{which}ticks": range(0, 101, 20), f"{which}label": label})


def shorten(name: str, length: int = 28) -> str:
    """Cut the middle out of a name that is too long: names of models differ at their ends."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - tail - 1]}…{name[-tail:]}"


def describe_data(section: Section) -> str:
    return f"average of {len(section.datasets)} data sets" if section.overall == AVERAGE else section.overall


def note_left_out(section: Section, subjects: Sequence[Subject]) -> str:
    more = len(section.subjects) - len(subjects)
    return f" {more} more {'model is' if more == 1 else 'models are'} in the tables." if more else ""


def as_svg(figure: Figure) -> str:
    """Render a figure as `<svg>` with real text and with colours from the page; one with panels also for a narrow page,
    where they are below one another."""
    across = _svg(figure, COLUMNS, figure.name)
    if not figure.narrows:
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
            dpi=200 if columns > 1 else 100,  # of pictures inside; a narrow page is small
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

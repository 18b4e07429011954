"""The common style of all figures, and writing them to files or into a page.

Colours are Okabe and Ito's, darkened to a contrast of at least 4.5 on white; every series also has its own marker, so
that nothing depends on colour alone. In dark mode a page gives the same colour names lighter values
(`static/page.css`).
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.transforms import offset_copy

from rayclip.reports.document import Figure
from rayclip.reports.numbers import Attack, Entry, Section, Subject
from rayclip.reports.results import JudgedCell, Results
from rayclip.store import Store

INK, MUTED, GRID, PAPER = "#1b1f24", "#57606a", "#e3e7eb", "#ffffff"
SERIES = ("#0072b2", "#c44e00", "#007d5c", "#a4447d", "#8a6500", "#3f4a55", "#b0003a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RIGHT, WRONG = SERIES[2], SERIES[1]
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


def panels(count: int, *, columns: int = 3, width: float = 3.0, height: float = 2.6) -> tuple[Canvas, list[Axes]]:
    """Return a canvas with `count` axes in rows of at most `columns`; width and height per panel in inches."""
    across = min(count, columns)
    down = -(-count // across)
    canvas = Canvas(figsize=(max(4.2, width * across), height * down))
    grid = canvas.subplots(down, across, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return canvas, axes[:count]


def percent_axis(axes: Axes, values: Sequence[float], label: str = "") -> None:
    """Scale the y axis from 0 to a little above the highest value, in percent."""
    axes.set_ylim(0, min(104, max([*values, 5]) * 1.12))
    axes.set_ylabel(label)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Label the right ends of lines with names and markers, moved apart where they would touch.

    Args:
        ends: (x, y, name, colour, marker) of each line.
    """
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    right = max((x for x, *_ in ends), default=0.0)
    places = apart([y for _, y, *_ in ends], 0.085 * (high - low), high)
    beside = offset_copy(axes.transData, axes.figure, x=12, units="points")  # type: ignore[arg-type]
    for (_, _, name, colour, marker), at in zip(ends, places, strict=True):
        axes.scatter([right], [at], s=16, color=colour, marker=marker, linewidths=0, transform=beside, clip_on=False)
        axes.annotate(
            name,
            (right, at),
            xytext=(18, 0),
            textcoords="offset points",
            va="center",
            color=colour,
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
    if len(section.subjects) <= most:
        return list(section.subjects)

    chosen = set(by_interest(section)[:most])
    return [s for s in section.subjects if s in chosen]


def by_interest(section: Section) -> list[Subject]:
    """Sort subjects: an untouched model first, the others by the accuracy that models are ranked by, best first."""
    found = section.ranked(section.overall, section.main)
    untouched = [s for s in section.subjects if s.model.method is None and s.defense == "none"][:1]
    others = [s for s in section.subjects if s not in untouched]
    return untouched + sorted(others, key=lambda s: found[s].top1 if s in found else -1.0, reverse=True)


class Kept:
    """Selects the examples to show: an untouched model and the best one, on one data set, under one attack.

    The attack is the strongest for which the evaluation kept examples of both.
    """

    def __init__(self, results: Results, section: Section) -> None:
        self.results, self.section = results, section
        self._subjects = by_interest(section)

    def entries(
        self, kinds: Sequence[str], has: Callable[[JudgedCell], bool]
    ) -> list[tuple[Subject, str, Attack, Entry]]:
        """Return at most two entries of one data set and one attack, of the first of these kinds of attack.

        Args:
            has: whether a cell has the examples to be shown.
        """
        best: list[tuple[Subject, str, Attack, Entry]] = []
        attacks = [a for kind in kinds for a in reversed(self.section.attacks) if a.kind == kind]
        for subjects in (self._subjects[:2], self._subjects[:_ASKED]):
            for attack in attacks:
                found = self._under(attack, subjects, has)
                if len(found) == min(2, len(subjects)):
                    return found
                best = best or found
        return best

    def _under(
        self, attack: Attack, subjects: Sequence[Subject], has: Callable[[JudgedCell], bool]
    ) -> list[tuple[Subject, str, Attack, Entry]]:
        """Return entries with examples on the first data set where these subjects were attacked."""
        for dataset in self.section.datasets:
            there = [(s, dataset, attack, e) for s in subjects if (e := self.section.get(s, dataset, attack))]
            if there:
                return [found for found in there if has(found[3].cells[0])][:2]
        return []


def as_svg(figure: Figure) -> str:
    """Render a figure as an `<svg>` element with real text and with colours from the page."""
    svg = _bytes(figure, "svg", {"svg.fonttype": "none"}, transparent=True).decode()
    svg = svg[svg.index("<svg") :]
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans'")
    prefix = re.sub(r"\W+", "-", figure.name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def write_figure(figure: Figure, folder: Path) -> dict[str, Path]:
    """Write a figure as SVG, PDF and PNG below `folder`, each atomically; return the paths by file ending."""
    store = Store(str(folder.absolute()))
    paths = {}
    for form in ("svg", "pdf", "png"):
        name = f"{figure.name}.{form}"
        store.write(name, _bytes(figure, form, {"svg.fonttype": "path"}))
        paths[form] = store.path(name)
    return paths


def _bytes(figure: Figure, form: str, rc: dict[str, Any], *, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with style(), rc_context({**rc, "svg.hashsalt": figure.name}):
        canvas = figure.draw()
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

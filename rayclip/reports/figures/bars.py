"""Bars of the models side by side: a group a data set, or of one data set a group an attack."""

from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from rayclip.reports.document import Figure
from rayclip.reports.figures.curves import left_out, where
from rayclip.reports.figures.style import GRID, INK, SERIES, few, percent_axis, short
from rayclip.reports.numbers import AVERAGE, Section
from rayclip.reports.table import heading

_MOST = 5
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")


def bars(section: Section) -> list[Figure]:
    """Of more models than can be told apart, an untouched one and the best."""
    several = section.overall == AVERAGE
    groups = (
        [(d, d, section.main) for d in section.columns]
        if several
        else [(heading(a.label), section.overall, a) for a in section.attacks]
    )
    subjects = few(section, _MOST)
    if len(groups) < 2:
        return []

    def draw() -> Canvas:
        width = max(5.0, 0.5 + len(groups) * (0.35 + 0.17 * len(subjects)))
        canvas = Canvas(figsize=(min(width, 14.0), 3.6))
        ax = canvas.subplots()
        thick, tops = 0.8 / len(subjects), []
        for i, subject in enumerate(subjects):
            for g, (_, dataset, attack) in enumerate(groups):
                number = section.number(subject, dataset, attack)
                if number is None:
                    continue
                tops.append(number.high)
                x = g + (i - (len(subjects) - 1) / 2) * thick
                ax.bar(
                    x,
                    number.top1,
                    thick * 0.9,
                    color=SERIES[i],
                    hatch=_HATCHES[i],
                    edgecolor=GRID,
                    linewidth=0,
                )
                ax.errorbar(
                    x,
                    number.top1,
                    [[number.top1 - number.low], [number.high - number.top1]],
                    ecolor=INK,
                    elinewidth=1.0,
                    linestyle="none",
                )
        slanted = len(groups) > 6
        ax.set_xticks(
            range(len(groups)),
            [g[0] for g in groups],
            rotation=35 if slanted else 0,
            ha="right" if slanted else "center",
        )
        ax.grid(visible=False, axis="x")
        percent_axis(ax, tops, "accuracy in %")
        ax.tick_params(axis="x", length=0)
        keys = [
            Patch(facecolor=SERIES[i], hatch=_HATCHES[i], edgecolor=GRID, linewidth=0, label=short(s.name, 30))
            for i, s in enumerate(subjects)
        ]
        canvas.legend(handles=keys, loc="outside upper left", ncols=min(5, len(subjects)), frameon=False, fontsize=8.5)
        return canvas

    about = ", ".join(" ".join(label.split()) for label, _, _ in groups)
    under = f" under {heading(section.main.label)}" if several else f" on {where(section)}"
    return [
        Figure(
            name="bars",
            title=f"Accuracy by {'data set' if several else 'attack'}{under}",
            caption=f"Whiskers are 95 % intervals.{left_out(section, subjects)}",
            alt=f"Bars of {', '.join(s.name for s in subjects)} for each of {about}. The tables hold the numbers.",
            draw=draw,
        )
    ]

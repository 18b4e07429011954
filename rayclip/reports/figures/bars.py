"""Bar charts of models side by side: a group per data set, or per attack if there is only one data set."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from rayclip.reports.choosing import choose_subjects
from rayclip.reports.figures.style import (
    GRID,
    INK,
    SERIES,
    accuracy_axis,
    describe_data,
    legend,
    note_left_out,
    shorten,
    whiskers,
)
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading, under
from rayclip.reports.section import AVERAGE, Number, Section, Subject

_MOST = 5
_ACROSS, _NARROW = 8, 3  # groups side by side; more would be too small in print, or on a narrow page
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")


def bars(section: Section) -> list[Figure]:
    """Return the bar chart; of too many models it shows an untouched one and the best."""
    several = section.overall == AVERAGE
    columns = (
        [(d, d, section.main) for d in section.columns]
        if several
        else [(heading(a.label), section.overall, a) for a in section.attacks]
    )
    subjects = choose_subjects(section, _MOST)
    ranked = {name: section.ranked(dataset, attack) for name, dataset, attack in columns}
    groups = [name for name, _, _ in columns if any(s in ranked[name] for s in subjects)]
    if len(groups) < 2:
        return []

    def draw(columns: int) -> Canvas:
        down = -(-len(groups) // (_ACROSS if columns > 1 else _NARROW))
        across = -(-len(groups) // down)
        canvas = Canvas(figsize=(max(5.0, 0.6 + across * (0.35 + 0.14 * len(subjects))), 0.5 + 2.6 * down))
        for row, ax in enumerate(canvas.subplots(down, 1, squeeze=False).flat):
            names = groups[row * across : (row + 1) * across]
            _draw_groups(ax, subjects, [ranked[name] for name in names])
            if across > 6 and max(len(word) for name in groups for word in name.split()) > 8:
                ax.set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor")
            else:
                ax.set_xticks(range(len(names)), ["\n".join(name.rsplit(" ", 1)) for name in names])
            ax.set_xlim(-0.6, across - 0.4)
            ax.grid(visible=False, axis="x")
            ax.tick_params(axis="x", length=0)
            accuracy_axis(ax, "y", "accuracy in %")
        keys = {
            shorten(s.name): Patch(facecolor=SERIES[i], hatch=_HATCHES[i], edgecolor=GRID, linewidth=0)
            for i, s in enumerate(subjects)
        }
        legend(canvas, keys, min(3, columns), place="outside upper left")
        return canvas

    when = under(section.main) if several else f"on {describe_data(section)}"
    return [
        Figure(
            name="bars",
            title=f"Accuracy by {'data set' if several else 'attack'} {when}",
            caption=f"Whiskers are 95 % intervals.{note_left_out(section, subjects)}",
            alt=f"Bars of {', '.join(s.name for s in subjects)} for each of {', '.join(groups)}. The tables hold the "
            "numbers.",
            draw=draw,
            narrows=len(groups) > _NARROW,
        )
    ]


def _draw_groups(ax: Axes, subjects: Sequence[Subject], columns: Sequence[Mapping[Subject, Number]]) -> None:
    """Draw a group of bars for each column."""
    thick = 0.8 / len(subjects)
    for i, subject in enumerate(subjects):
        for g, column in enumerate(columns):
            if subject in column:
                x, number = g + (i - (len(subjects) - 1) / 2) * thick, column[subject]
                ax.bar(x, number.top1, thick * 0.9, color=SERIES[i], hatch=_HATCHES[i], edgecolor=GRID, linewidth=0)
                arms = whiskers(number)
                ax.errorbar(x, number.top1, arms, ecolor=INK, elinewidth=1.0, linestyle="none", clip_on=False)

"""Reliability diagrams: accuracy over confidence, a panel per attack, a line per model."""

from matplotlib.figure import Figure as Canvas

from rayclip.reports.calibration import BINS, Calibrations, pooled
from rayclip.reports.choosing import choose_subjects
from rayclip.reports.figures.style import (
    MARKERS,
    MUTED,
    SERIES,
    accuracy_axis,
    legend,
    note_left_out,
    panels,
    shorten,
)
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.section import Section

_MOST = 7  # lines per panel


def reliability_figure(section: Section, found: Calibrations) -> list[Figure]:
    """Return the figure: without an attack, and under the last one of the tables."""
    single = [attack for attack in section.attacks if attack.kind != "worst"]
    attacks = dict.fromkeys([*(a for a in single if a.kind == "clean"), single[-1]])
    shown = {
        attack: {s: made for s in section.subjects if (made := pooled(section, found, s, attack)) is not None}
        for attack in attacks
    }
    shown = {attack: members for attack, members in shown.items() if members}
    if not shown:
        return []
    subjects = choose_subjects(section, _MOST)

    def draw(columns: int) -> Canvas:
        canvas, axes = panels(len(shown), columns)
        keys = {}
        for ax, (attack, members) in zip(axes, shown.items(), strict=True):
            ax.plot((0, 100), (0, 100), color=MUTED, linestyle="--", linewidth=1.0)
            for i, subject in enumerate(subjects):
                if subject not in members:
                    continue
                made, some_M = members[subject], members[subject].count_M > 0
                keys[shorten(subject.name)] = ax.plot(
                    *(100 * made.confidence_M[some_M], 100 * made.accuracy_M[some_M]),
                    color=SERIES[i % len(SERIES)],
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=4,
                    linewidth=1.2,
                    clip_on=False,
                )[0]
            ax.set_title(heading(attack.label))
            accuracy_axis(ax, "x", "confidence in %")
            accuracy_axis(ax, "y", "accuracy in %")
        legend(canvas, keys, columns)
        return canvas

    gaps = "; ".join(
        f"{heading(attack.label)}: " + ", ".join(f"{s.name} {members[s].ece:.1f} %" for s in subjects if s in members)
        for attack, members in shown.items()
    )
    return [
        Figure(
            name="reliability",
            title="Reliability: accuracy over confidence",
            caption=f"Mean accuracy and confidence in {BINS} bins; below the dashed line a model is surer than it is "
            f"right.{note_left_out(section, subjects)}",
            alt=f"Accuracy over confidence, all samples together. Expected calibration error, {gaps}.",
            draw=draw,
            narrows=True,
        )
    ]

"""The trade-off figure: robust against clean accuracy, with the Pareto front."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas

from rayclip.evaluation.front import pareto_front
from rayclip.models.specs import parse_mix
from rayclip.reports.figures.style import (
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    accuracy_axis,
    describe_data,
    legend,
    shorten,
    whiskers,
)
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.section import Section, Subject

_CROWD = 12  # beyond this many points, no whiskers, and a look per method in place of one per model


def tradeoff(section: Section) -> list[Figure]:
    """Return the figure: a point per model, the Pareto front, and a curve through interpolations of two models."""
    clean, robust = section.clean, section.main
    if clean is None or robust.kind == "clean":
        return []
    unharmed, harmed = (section.ranked(section.overall, attack) for attack in (clean, robust))
    points = {s: (unharmed[s], harmed[s]) for s in section.subjects if s in unharmed and s in harmed}
    if len(points) < 2:
        return []
    places = {s: (c.top1, r.top1) for s, (c, r) in points.items()}
    front = sorted(itertools.compress(places, pareto_front(list(places.values()))), key=lambda s: places[s])
    curves = interpolations(list(points))
    crowded = len(points) > _CROWD

    def draw(columns: int) -> Canvas:
        canvas = Canvas(figsize=(6.4, 4.6) if columns > 1 else (4.2, 4.6))
        ax = canvas.subplots()
        ax.step(*zip(*map(places.get, front), strict=True), where="pre", color=MUTED, linestyle="--", linewidth=1.2)
        for members in curves.values():
            ax.plot(*zip(*map(places.get, members), strict=True), color=MUTED, linewidth=1.4, zorder=1)
        looks = _looks(list(points), by_method=crowded)
        keys: dict[str, Any] = {}
        for i, (subject, (c, r)) in enumerate(points.items()):
            name, colour, marker = looks[subject]
            hollow = subject.defense != "none"
            keys[name] = ax.errorbar(
                c.top1,
                r.top1,
                xerr=None if crowded else whiskers(c),
                yerr=None if crowded else whiskers(r),
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
            )[0]
        accuracy_axis(ax, "x", f"clean accuracy in % ({describe_data(section)})")
        accuracy_axis(ax, "y", f"{heading(robust.label)} accuracy in %")
        legend(canvas, keys, columns)
        return canvas

    named = ", ".join(s.name for s in front)
    more = "" if crowded else " Whiskers are 95 % intervals."
    more += " Lines join models whose weights lie between two others." if curves else ""
    more += " Hollow: behind a defence." if any(s.defense != "none" for s in points) else ""
    fewer = sum(section.partial(s, section.overall, robust) for s in section.subjects if s not in points)
    more += f" {fewer} that fewer attacks were tried on are not here." if fewer else ""
    return [
        Figure(
            name="tradeoff",
            title=f"Clean against robust accuracy, {describe_data(section)}",
            caption=f"Dashed: the Pareto front; no model is better at both than one on it: {named}.{more}",
            alt=f"{len(points)} models as points, clean accuracy to the right, {heading(robust.label)} accuracy "
            f"upward. On the Pareto front: {named}.",
            draw=draw,
            narrows=True,
        )
    ]


def interpolations(subjects: Sequence[Subject]) -> dict[tuple[str, str, str, str], list[Subject]]:
    """Return models `mix:START+END@a` with their two ends in order of a, by (start, end, scorer, defence)."""
    found: dict[tuple[str, str, str, str], dict[float, Subject]] = {}
    for subject in subjects:
        if subject.model.is_mix:
            start, end, a = parse_mix(subject.model.spec)
            found.setdefault((start, end, subject.scorer, subject.defense), {})[a] = subject
    for (start, end, scorer, defense), members in found.items():
        for subject in subjects:
            place = {start: 0.0, end: 1.0}.get(subject.model.spec)
            if place is not None and (subject.scorer, subject.defense) == (scorer, defense):
                members.setdefault(place, subject)
    return {key: [m for _, m in sorted(members.items())] for key, members in found.items() if len(members) > 1}


def _looks(subjects: Sequence[Subject], *, by_method: bool) -> Mapping[Subject, tuple[str, str, str]]:
    """Return each subject's name in the legend, colour and marker."""
    found, used = {}, dict[str, int]()
    for subject in subjects:
        kind = "between two models" if subject.model.is_mix else subject.model.method or "untouched"
        name = kind if by_method else shorten(subject.name)
        i = used.setdefault(name, len(used))
        look = (SERIES[i % len(SERIES)], MARKERS[(i + i // len(SERIES)) % len(MARKERS)])
        found[subject] = (name, *((INK, "*") if kind == "untouched" else look))
    return found

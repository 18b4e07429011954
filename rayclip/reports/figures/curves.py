"""Curves of accuracy over shots, eps and training steps: one panel per attack, one line per model or method."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from rayclip.reports.choosing import choose_subjects
from rayclip.reports.figures.style import (
    MARKERS,
    MUTED,
    SERIES,
    accuracy_axis,
    describe_data,
    legend,
    note_left_out,
    panels,
    shorten,
)
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.section import Attack, Number, Section, Subject

_MOST = 7  # lines per panel
_APART = 1 / 7  # least distance between two budgets' ticks, of the axis


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The content of one panel."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, Number]]]  # points by name, x ascending
    level: tuple[str, float] | None = None  # name and height of a level line
    ticks: Mapping[float, str] | None = None  # names of values of x; None for numbers


def over_shots(section: Section) -> list[Figure]:
    """Return the curves of methods over shots (images per class), with the last checkpoint of each training run."""
    series: dict[str, dict[int | None, Subject]] = {}
    earlier = {s for run in _runs(section).values() for step, s in run.items() if step < max(run)}
    plain_first = sorted(section.subjects, key=lambda s: s.defense != "none")  # keeps the colours of the other figures
    for subject in (s for s in plain_first if s not in earlier):
        if subject.model.method is not None and not subject.model.is_mix:
            plain = re.sub(r"\b(\d+-shot|full|epoch \d+)(?= |$)", "", subject.name)
            name = " ".join(plain.split()) or str(subject.model.method)
            series.setdefault(name, {})[subject.model.shots] = subject
    series = {name: members for name, members in series.items() if len(members) > 1}
    if not series:
        return []
    shots = sorted({s for m in series.values() for s in m}, key=lambda s: (s is None, s))
    ticks = {float(i): str(s or "full") for i, s in enumerate(shots)}
    lines = {name: {float(shots.index(s)): m[s] for s in shots if s in m} for name, m in series.items()}
    untouched = next((s for s in section.subjects if s.is_untouched), None)
    title = f"Accuracy over training images per class, {describe_data(section)}"
    found = _panels_of_attacks(section, lines, untouched, ticks)
    return [_figure("shots", title, "training images per class", found, "")]


def over_steps(section: Section) -> list[Figure]:
    """Return the curves of training runs over steps: their checkpoints, from the model that was fine-tuned."""
    runs = {run: members for run, members in _runs(section).items() if len(members) > 1}
    if not runs:
        return []
    known = {(s.model.fingerprint, s.scorer): s for s in section.subjects if s.defense == "none"}
    names = _run_names({run: members[max(members)] for run, members in runs.items()})
    lines = {}
    for run, members in runs.items():
        last = members[max(members)]
        start = known.get((last.model.config.get("model_fingerprint", ""), last.scorer))
        lines[names[run]] = {**({} if start is None else {0.0: start}), **members}
    note = " Step 0 is the model before the training." if any(0.0 in members for members in lines.values()) else ""
    title = f"Accuracy over training steps, {describe_data(section)}"
    return [_figure("steps", title, "training step", _panels_of_attacks(section, lines), note)]


def _runs(section: Section) -> dict[str, dict[float, Subject]]:
    """Return the checkpoints of each training run by step, ascending; without defence, by one scorer."""
    runs: dict[str, dict[float, Subject]] = {}
    for subject in section.subjects:
        lineage = subject.model.lineage or {}
        if subject.defense == "none" and "step" in lineage and "digest" in lineage:
            runs.setdefault(f"{lineage['digest']} {subject.scorer}", {})[float(lineage["step"])] = subject
    return {run: dict(sorted(members.items())) for run, members in runs.items()}


def _run_names(ends: Mapping[str, Subject]) -> dict[str, str]:
    """Name runs by a checkpoint's label or method, and where names are equal by the settings that differ."""
    names, settings = {}, {}
    for run, subject in ends.items():
        model = subject.model
        name = str(model.method) if model.label == model.spec else re.sub(r" epoch \d+$", "", model.label)
        names[run] = name if subject.scorer == "template" else f"{name}, {subject.scorer}"
        parts = [model.config, model.config.get("method") or {}, model.config.get("recipe") or {}]
        settings[run] = {k: v for part in parts for k, v in part.items() if not isinstance(v, Mapping)}
    for name, times in Counter(names.values()).items():
        alike = [run for run in names if names[run] == name] if times > 1 else []
        differing = [
            k for run in alike for k in settings[run] if any(settings[r].get(k) != settings[run][k] for r in alike)
        ]
        shown = [key for key in dict.fromkeys(differing) if not key.endswith("fingerprint")]
        for run in alike:
            own = [f"{key} {settings[run].get(key, 'none')}" for key in shown]
            names[run] = " ".join([name, *(own or [run[:4]])])
    return names


def over_eps(section: Section) -> list[Figure]:
    """Return the curves of attacks that were run at several budgets; the value at 0 is the clean accuracy."""
    families: dict[str, dict[float, Attack]] = {}
    for attack in (a for a in section.attacks if a.eps is not None):
        name = heading(attack.label).removesuffix(f" {attack.eps}")
        families.setdefault(name, {})[255 * attack.budget] = attack
    families = {name: members for name, members in families.items() if len(members) > 1}
    if not families:
        return []
    subjects = choose_subjects(section, _MOST)
    start = {} if section.clean is None else {0.0: section.clean}
    found = []
    for name, members in families.items():
        budgets = {**start, **dict(sorted(members.items()))}
        ranked = {x: section.ranked(section.overall, a) for x, a in budgets.items()}
        lines = {s.name: [(x, numbers[s]) for x, numbers in ranked.items() if s in numbers] for s in subjects}
        ticks = {x: f"{x:g}/255" if x else "0" for x in _apart(list(budgets))}
        found.append(Panel(title=name, lines=lines, ticks=ticks))
    title = f"Accuracy over the attack's budget, {describe_data(section)}"
    return [_figure("eps", title, "budget", found, note_left_out(section, subjects))]


def _apart(values: Sequence[float]) -> list[float]:
    """Leave out values whose labels would touch those of larger ones."""
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if all(abs(value - other) >= _APART * max(values) for other in kept):
            kept.append(value)
    return kept


def _panels_of_attacks(
    section: Section,
    lines: Mapping[str, Mapping[float, Subject]],
    level: Subject | None = None,
    ticks: Mapping[float, str] | None = None,
) -> list[Panel]:
    """Return a panel per attack, with models by x for each line, and one that is drawn as a level line."""
    found = []
    for attack in _chosen_attacks(section):
        ranked = section.ranked(section.overall, attack)
        shown = {name: [(x, ranked[s]) for x, s in members.items() if s in ranked] for name, members in lines.items()}
        number = None if level is None else section.number(level, section.overall, attack)
        flat = None if level is None or number is None else (level.name, number.top1)
        found.append(Panel(title=heading(attack.label), lines=shown, level=flat, ticks=ticks))
    return found


def _figure(name: str, title: str, xlabel: str, found: Sequence[Panel], note: str) -> Figure:
    names = list(found[0].lines)
    dotted = "".join(dict.fromkeys(f" Dotted: {panel.level[0]}." for panel in found if panel.level is not None))
    more = f" {len(names) - _MOST} more are in the tables." if len(names) > _MOST else ""
    return Figure(
        name=name,
        title=title,
        caption=f"Bands are 95 % intervals.{dotted}{note}{more}",
        alt=f"Lines of {', '.join(names[:_MOST])}: accuracy against {xlabel}, a panel for each of "
        f"{', '.join(panel.title for panel in found)}. The tables hold the numbers.",
        draw=partial(_draw, xlabel, found),
        narrows=len(found) > 1,
    )


def _draw(xlabel: str, found: Sequence[Panel], columns: int) -> Canvas:
    canvas, axes = panels(len(found), columns, share_x=found[0].ticks == found[-1].ticks)
    across = min(columns, len(found))
    for i, (ax, panel) in enumerate(zip(axes, found, strict=True)):
        _draw_lines(ax, panel)
        accuracy_axis(ax, "y", "accuracy in %" if i % across == 0 else "")
        ax.set_title(panel.title)
        ax.grid(visible=False, axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if panel.ticks:
            ax.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        if i >= len(found) - across:
            ax.set_xlabel(xlabel)
    keys = {str(key.get_label()): key for ax in axes for key in ax.get_lines()}
    canvas.set_figheight(canvas.get_figheight() + 0.2 * -(-len(keys) // across))
    legend(canvas, keys, across)
    return canvas


def _draw_lines(ax: Axes, panel: Panel) -> None:
    for i, (name, points) in enumerate(list(panel.lines.items())[:_MOST]):
        x, numbers = [x for x, _ in points], [number for _, number in points]
        low, high = [number.low for number in numbers], [number.high for number in numbers]
        colour, y = SERIES[i % len(SERIES)], [number.top1 for number in numbers]
        ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, y, color=colour, marker=MARKERS[i], markeredgecolor="none", clip_on=False, label=shorten(name))
    if panel.level is not None:
        name, height = panel.level
        ax.axhline(height, color=MUTED, linestyle=":", linewidth=1.4, label=shorten(name))
        place: Any = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        ax.text(1, height, shorten(name), color=MUTED, fontsize=7.5, **place)


def _chosen_attacks(section: Section) -> list[Attack]:
    """Return at most six attacks: clean, the worst case, one of each kind (of its budget if possible), then others."""
    ends = [a for a in section.attacks if a.kind == "clean" or a == section.main]
    rest = [a for a in section.attacks if a not in ends]
    by_budget = sorted(rest, key=lambda a: a.eps not in (None, section.main.eps))
    firsts = [a for a in {a.kind: a for a in reversed(by_budget)}.values() if a.kind != "worst"]
    others = sorted((a for a in rest if a not in firsts), key=lambda a: a.kind != "worst")
    chosen = [*ends, *firsts, *others][:6]
    return [a for a in section.attacks if a in chosen]

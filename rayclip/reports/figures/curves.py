"""Curves of accuracy over shots, eps and training steps: one panel per attack, one line per model or method."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rayclip.reports.figures.style import (
    MARKERS,
    MUTED,
    SERIES,
    End,
    accuracy_axis,
    few,
    label_ends,
    left_out,
    panels,
    short,
    where,
)
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.section import Attack, Number, Section, Subject

Line = Sequence[tuple[float, Number]]  # (x, y) of each point, x ascending
_MOST = 7  # lines per panel
_APART = 1 / 7  # least distance between two budgets' ticks, of the axis


def over_shots(section: Section) -> list[Figure]:
    """Return the curves of methods over shots (images per class), with the last checkpoint of each training run."""
    series: dict[str, dict[int | None, Subject]] = {}
    earlier = {s for run in _runs(section).values() for step, s in run.items() if step < max(run)}
    plain_first = sorted(section.subjects, key=lambda s: s.defense != "none")  # keeps the colours of the other figures
    for subject in (s for s in plain_first if s not in earlier):
        if subject.model.method is not None and "mix:" not in subject.model.spec:
            plain = re.sub(r"\b(\d+-shot|full|epoch \d+)(?= |$)", "", subject.name)
            name = " ".join(plain.split()) or str(subject.model.method)
            series.setdefault(name, {})[subject.model.shots] = subject
    series = {name: members for name, members in series.items() if len(members) > 1}
    if not series:
        return []
    shots = sorted({s for m in series.values() for s in m}, key=lambda s: (s is None, s))
    ticks = {float(i): "full" if s is None else str(s) for i, s in enumerate(shots)}
    lines = {
        name: {float(i): members[s] for i, s in enumerate(shots) if s in members} for name, members in series.items()
    }
    title, below = "Accuracy over training images per class", "training images per class"
    untouched = next((s for s in section.subjects if s.is_untouched), None)
    return [_figure(section, "shots", title, below, lines, ticks=ticks, level=untouched)]


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
    return [_figure(section, "steps", "Accuracy over training steps", "training step", lines, note=note)]


def _runs(section: Section) -> dict[str, dict[float, Subject]]:
    """Return the checkpoints of each training run by step, ascending; without defence, by one scorer."""
    runs: dict[str, dict[float, Subject]] = {}
    for subject in section.subjects:
        lineage = subject.model.lineage or {}
        if subject.defense == "none" and "step" in lineage and "digest" in lineage:
            runs.setdefault(f"{lineage['digest']} {subject.scorer}", {})[float(lineage["step"])] = subject
    return {run: dict(sorted(members.items())) for run, members in runs.items()}


def _run_names(ends: Mapping[str, Subject]) -> dict[str, str]:
    """Return a name for each training run, given one of its checkpoints.

    The name is the label without the epoch, else the method, with the settings that differ where names are equal.
    """
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
    start = {} if section.clean is None else {0.0: section.clean}
    for attack in (a for a in section.attacks if a.eps is not None):
        name = re.sub(r"_eps[\d.]+", "", attack.label)
        families.setdefault(name, dict(start))[255 * attack.budget] = attack
    families = {heading(name): members for name, members in families.items() if len(members) - len(start) > 1}
    if not families:
        return []
    subjects = few(section, _MOST)
    ranked = {a.label: section.ranked(section.overall, a) for a in section.attacks}

    def points(panel: str) -> dict[str, Line]:
        members = sorted(families[panel].items())
        return {s.name: [(x, ranked[a.label][s]) for x, a in members if s in ranked[a.label]] for s in subjects}

    def decorate(ax: Axes, panel: str) -> None:
        kept: list[float] = []
        for x in sorted(families[panel], reverse=True):
            if all(abs(x - other) >= _APART * max(families[panel]) for other in kept):
                kept.append(x)
        ax.set_xticks(kept, [f"{x:g}/255" if x else "0" for x in kept])

    return [
        Figure(
            name="eps",
            title=f"Accuracy over the attack's budget, {where(section)}",
            caption=f"Bands are 95 % intervals.{left_out(section, subjects)}",
            alt=f"Lines of {len(subjects)} models, accuracy against the attack's budget, a panel for each of "
            f"{', '.join(families)}. The tables hold the numbers.",
            draw=lambda columns: _draw_panels(columns, list(families), "budget", points, decorate, share_x=False),
            stacks=len(families) > 1,
        )
    ]


def _figure(
    section: Section,
    name: str,
    title: str,
    xlabel: str,
    lines: Mapping[str, Mapping[float, Subject]],
    *,
    ticks: Mapping[float, str] | None = None,
    level: Subject | None = None,
    note: str = "",
) -> Figure:
    """Return a figure with a panel per attack.

    Args:
        lines: the models by x, for each line.
        ticks: names of values of x.
        level: a model that is drawn as a level line.
    """
    shown = dict(list(lines.items())[:_MOST])
    attacks = {heading(attack.label): attack for attack in _panel_attacks(section)}
    ranked = {a.label: section.ranked(section.overall, a) for a in attacks.values()}

    def points(panel: str) -> dict[str, Line]:
        numbers = ranked[attacks[panel].label]
        return {name: [(x, numbers[s]) for x, s in members.items() if s in numbers] for name, members in shown.items()}

    def decorate(ax: Axes, panel: str) -> None:
        if ticks:
            ax.set_xticks(list(ticks), list(ticks.values()))

    def level_of(panel: str) -> tuple[str, float] | None:
        number = None if level is None else section.number(level, section.overall, attacks[panel])
        return None if level is None or number is None else (level.name, number.top1)

    note += f" Dotted: {level.name}." if level is not None else ""
    note += f" {len(lines) - _MOST} more are in the tables." if len(lines) > _MOST else ""
    return Figure(
        name=name,
        title=f"{title}, {where(section)}",
        caption=f"Bands are 95 % intervals.{note}",
        alt=f"Lines of {', '.join(shown)}: accuracy against {xlabel}, a panel for each of {', '.join(attacks)}. The "
        "tables hold the numbers.",
        draw=lambda columns: _draw_panels(columns, list(attacks), xlabel, points, decorate, level_of),
        stacks=len(attacks) > 1,
    )


def _draw_panels(
    columns: int,
    names: Sequence[str],
    xlabel: str,
    points: Callable[[str], Mapping[str, Line]],
    decorate: Callable[[Axes, str], None],
    level: Callable[[str], tuple[str, float] | None] = lambda panel: None,
    *,
    share_x: bool = True,
) -> Canvas:
    canvas, axes = panels(len(names), columns, share_x=share_x)
    across = min(columns, len(names))
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        accuracy_axis(ax.yaxis, "accuracy in %" if i % across == 0 else "")
        _draw_lines(ax, points(name), level(name))
        decorate(ax, name)
        ax.grid(visible=False, axis="x")
        ax.set_title(name)
        if i >= len(names) - across:
            ax.set_xlabel(xlabel)
    return canvas


def _draw_lines(ax: Axes, lines: Mapping[str, Line], level: tuple[str, float] | None) -> None:
    ends = []
    for i, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        x, numbers = zip(*points, strict=True)
        y = [number.top1 for number in numbers]
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        band = [number.low for number in numbers], [number.high for number in numbers]
        ax.fill_between(x, *band, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, y, color=colour, marker=marker, markeredgecolor="none", clip_on=False)
        ends.append(End(x[-1], y[-1], short(name), colour, marker))
    if level is not None and ends:
        name, height = level
        ax.axhline(height, color=MUTED, linestyle=":", linewidth=1.4)
        ends.append(End(max(end.x for end in ends), height, short(name), MUTED))
    label_ends(ax, ends)


def _panel_attacks(section: Section) -> list[Attack]:
    """Return at most six attacks to draw.

    First clean and the worst case, then one of each kind (with the worst case's budget if possible), then worst cases
    within other budgets, then others.
    """
    ends = [a for a in section.attacks if a.kind == "clean" or a == section.main]
    rest = [a for a in section.attacks if a not in ends]
    by_budget = sorted(rest, key=lambda a: a.eps not in (None, section.main.eps))
    firsts = [a for a in {a.kind: a for a in reversed(by_budget)}.values() if a.kind != "worst"]
    others = sorted((a for a in rest if a not in firsts), key=lambda a: a.kind != "worst")
    chosen = [*ends, *firsts, *others][:6]
    return [a for a in section.attacks if a in chosen]

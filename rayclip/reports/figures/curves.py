"""Curves of accuracy over shots, eps and training steps: one panel per attack, one line per model or method."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rayclip.reports.document import Figure
from rayclip.reports.figures.style import MARKERS, MUTED, SERIES, few, label_ends, panels, percent_axis, short
from rayclip.reports.numbers import AVERAGE, Attack, Number, Section, Subject
from rayclip.reports.table import heading

Line = list[tuple[float, Number]]  # (x, y) of each point, x ascending
_MOST = 7  # lines per panel


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
    at = {s: float(i) for i, s in enumerate(shots)}
    lines = {
        name: {at[s]: subject for s, subject in sorted(members.items(), key=lambda item: at[item[0]])}
        for name, members in series.items()
    }
    return [
        _figure(
            section,
            "shots",
            "Accuracy over training images a class",
            "training images a class",
            lines,
            ticks,
            flat=_untouched(section),
        )
    ]


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
    return [_figure(section, "steps", "Accuracy over training steps", "training step", lines, {}, note=note)]


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
    for name, count in Counter(names.values()).items():
        alike = [run for run in names if names[run] == name] if count > 1 else []
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
    clean = next((a for a in section.attacks if a.kind == "clean"), None)
    for attack in section.attacks:
        if attack.eps is not None:
            families.setdefault(re.sub(r"_eps[\d.]+", "", attack.label), {})[_in_255ths(attack.eps)] = attack
    families = {name: members for name, members in families.items() if len(members) > 1}
    if not families:
        return []
    subjects = few(section, _MOST)
    ranked = {a.label: section.ranked(section.overall, a) for a in section.attacks}

    def line(subject: Subject, members: Mapping[float, Attack]) -> Line:
        wanted = {**({0.0: clean} if clean is not None else {}), **dict(sorted(members.items()))}
        return [(x, ranked[a.label][subject]) for x, a in wanted.items() if subject in ranked[a.label]]

    def draw() -> Canvas:
        canvas, axes = panels(len(families))
        for ax, (name, members) in zip(axes, families.items(), strict=True):
            _lines(ax, {s.name: line(s, members) for s in subjects}, label=ax is axes[-1])
            ax.set_title(heading(name))
            ax.set_xlabel("budget in 1/255")
        axes[0].set_ylabel("accuracy in %")
        return canvas

    return [
        Figure(
            name="eps",
            title=f"Accuracy over the attack's budget, {where(section)}",
            caption=f"Bands are 95 % intervals.{left_out(section, subjects)}",
            alt=f"Lines of {len(subjects)} models, accuracy against the attack's budget, a panel for each of "
            f"{', '.join(map(heading, families))}. The tables hold the numbers.",
            draw=draw,
        )
    ]


def _figure(
    section: Section,
    name: str,
    title: str,
    xlabel: str,
    lines: Mapping[str, Mapping[float, Subject]],
    ticks: Mapping[float, str],
    flat: Subject | None = None,
    note: str = "",
) -> Figure:
    shown = dict(list(lines.items())[:_MOST])
    attacks = _panel_attacks(section)
    ranked = {a.label: section.ranked(section.overall, a) for a in attacks}

    def points(members: Mapping[float, Subject], attack: Attack) -> Line:
        return [(x, ranked[attack.label][s]) for x, s in members.items() if s in ranked[attack.label]]

    def draw() -> Canvas:
        canvas, axes = panels(len(attacks))
        across = min(3, len(attacks))
        for i, (ax, attack) in enumerate(zip(axes, attacks, strict=True)):
            level = section.number(flat, section.overall, attack) if flat is not None else None
            found = {name: points(members, attack) for name, members in shown.items()}
            _lines(ax, found, label=True, level=None if level is None else level.top1)
            ax.set_title(heading(attack.label))
            if ticks:
                ax.set_xticks(list(ticks), list(ticks.values()))
            if i >= len(attacks) - across:
                ax.set_xlabel(xlabel)
            if i % across == 0:
                ax.set_ylabel("accuracy in %")
        return canvas

    note += f" Dotted: {flat.name}." if flat is not None else ""
    more = f" {len(lines) - _MOST} more are in the tables." if len(lines) > _MOST else ""
    return Figure(
        name=name,
        title=f"{title}, {where(section)}",
        caption=f"Bands are 95 % intervals.{note}{more}",
        alt=f"Lines of {', '.join(shown)}: accuracy against {xlabel}, a panel for each of "
        f"{', '.join(heading(a.label) for a in attacks)}. The tables hold the numbers.",
        draw=draw,
    )


def _lines(ax: Axes, lines: Mapping[str, Line], *, label: bool, level: float | None = None) -> None:
    ends, values = [], [level or 0.0]
    for i, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1].top1 for p in points]
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        ax.fill_between(
            x, [p[1].low for p in points], [p[1].high for p in points], color=colour, alpha=0.13, linewidth=0
        )
        ax.plot(x, y, color=colour, marker=marker, markeredgecolor="none")
        ends.append((x[-1], y[-1], short(name), colour, marker))
        values += [p[1].high for p in points]
    if level is not None:
        ax.axhline(level, color=MUTED, linestyle=":", linewidth=1.4)
    percent_axis(ax, values)
    ax.grid(visible=False, axis="x")
    if label:
        label_ends(ax, ends)


def _panel_attacks(section: Section) -> list[Attack]:
    """Return at most six attacks to draw.

    First clean and the worst case, then one of each kind (with the worst case's budget if possible), then worst cases
    within other budgets, then others.
    """
    ends = [a for a in section.attacks if a.kind == "clean" or a == section.main]
    rest = [a for a in section.attacks if a not in ends]
    likest = sorted(rest, key=lambda a: a.eps not in (None, section.main.eps))
    firsts = [a for a in {a.kind: a for a in reversed(likest)}.values() if a.kind != "worst"]
    others = sorted((a for a in rest if a not in firsts), key=lambda a: a.kind != "worst")
    chosen = [*ends, *firsts, *others][:6]
    return [a for a in section.attacks if a in chosen]


def _untouched(section: Section) -> Subject | None:
    return next((s for s in section.subjects if s.model.method is None and s.defense == "none"), None)


def where(section: Section) -> str:
    return f"average of {len(section.datasets)} data sets" if section.overall == AVERAGE else section.overall


def left_out(section: Section, subjects: Sequence[Subject]) -> str:
    more = len(section.subjects) - len(subjects)
    return f" {more} more models are in the tables." if more else ""


def _in_255ths(eps: str) -> float:
    numerator, _, denominator = eps.partition("/")
    return 255 * float(numerator) / float(denominator or 1)

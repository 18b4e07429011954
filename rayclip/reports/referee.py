"""The referee's table: what a defence gains under attacks that ignore it, and what is left of that under all attacks.

Shapes: N samples, S seeds.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayclip.evaluation.aggregate import Ball, ball_of, wilson
from rayclip.evaluation.overhead import Overhead, read_overhead
from rayclip.reports.grid import Cell, Grid, accuracy, format_signed, number_cell
from rayclip.reports.notes import attack_notes, defense_notes, shared_note
from rayclip.reports.section import AVERAGE, Entry, Number, Section, Subject, average
from rayclip.reports.verdicts import Verdicts, align


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """Numbers of a model, behind a defence or without one.

    Attributes:
        clean, blind, worst: accuracy without an attack, under the attacks that ignore the defence, and under all.
        claimed, left: `blind` and `worst` less those of the undefended model under the same attacks, in percentage
            points; None without a defence.
        spread: largest standard deviation of these four over the seeds; 0 for one seed.
        overhead: cost of judging; None if it was not measured.
    """

    subject: Subject
    clean: Number | None
    blind: Number
    worst: Number
    claimed: Number | None = None
    left: Number | None = None
    spread: float = 0.0
    overhead: Overhead | None = None


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """Rulings that can be compared: on one data set (or `AVERAGE`), within one ball. `section` is that of one seed."""

    section: Section
    data: str
    ball: Ball
    rulings: Sequence[Ruling]
    seeds: int

    @property
    def title(self) -> str:
        data = f"average over {len(self.section.datasets)} data sets" if self.data == AVERAGE else self.data
        return f"{data}, {'l2 ' if self.ball.norm == 'l2' else ''}{self.ball.eps}"


def hear(sections: Sequence[Section]) -> list[Hearing]:
    """Return the rulings of sections that differ in the seed alone, by data set and on average: of models that were
    attacked undefended, and behind a defence both ignoring it and through it."""
    groups: dict[str, list[Section]] = {}
    for section in sections:
        groups.setdefault(json.dumps({**section.shared, "seed": None}), []).append(section)
    return [hearing for alike in groups.values() for hearing in _hear(alike)]


def _hear(seeds: Sequence[Section]) -> Iterator[Hearing]:
    section = seeds[0]
    for ball in dict.fromkeys(b for a in section.attacks if a.kind != "worst" and (b := ball_of(a.settings))):
        by_data = {data: _rulings(seeds, data, ball) for data in section.datasets}
        shared = [s for s in section.subjects if all(s in rulings for rulings in by_data.values())]
        if len(by_data) > 1:
            by_data[AVERAGE] = {s: _mean([rulings[s] for rulings in by_data.values()]) for s in shared}
        for data, rulings in by_data.items():
            if any(ruling.claimed for ruling in rulings.values()):
                yield Hearing(section=section, data=data, ball=ball, rulings=list(rulings.values()), seeds=len(seeds))


def _rulings(seeds: Sequence[Section], data: str, ball: Ball) -> dict[Subject, Ruling]:
    found: dict[Subject, Ruling] = {}
    for base in (s for s in seeds[0].subjects if s.defense == "none"):
        own: dict[Subject, Ruling] = {}
        for subject in seeds[0].subjects:
            if subject.key[:2] == base.key[:2] and subject != base:
                ruling = _ruling(seeds, subject, base, data, ball)
                own |= {} if ruling is None else {subject: ruling}
        bare = _ruling(seeds, base, base, data, ball)
        if own and bare is not None:
            found |= {base: bare, **own}
    return found


def _ruling(seeds: Sequence[Section], subject: Subject, base: Subject, data: str, ball: Ball) -> Ruling | None:
    mine, bare = ([_plain(section, who, data) for section in seeds] for who in (subject, base))
    tried = [label for label in mine[0] if all(label in each for each in mine)]
    every = [label for label in tried if ball_of(mine[0][label].protocol) == ball]
    ignoring = [label for label in every if mine[0][label].protocol.get("aim", "ignore") == "ignore"]
    shared = [label for label in ignoring if all(label in each for each in bare)]
    if not shared or (subject != base and len(every) == len(ignoring)):
        return None
    clean = [label for label in tried if mine[0][label].protocol["attack"] == "clean"]
    blind_SN, bare_SN = _align((mine, ignoring), (bare, shared))
    worst_SN, less_SN = _align((mine, every), (bare, shared))  # of fewer samples, if the other attacks had fewer
    ids = [(cell.id, cell.store) for each in mine for label in clean for cell in each[label].cells]
    found = Ruling(
        subject=subject,
        clean=_share(*_align((mine, clean))) if clean else None,
        blind=_share(blind_SN),
        worst=_share(worst_SN),
        overhead=next((cost for id_, store in ids if (cost := read_overhead(id_, store)) is not None), None),
    )
    by_seed = [blind_SN.mean(1), worst_SN.mean(1)]
    if subject != base:
        found = replace(found, claimed=_gain(blind_SN, bare_SN), left=_gain(worst_SN, less_SN))
        by_seed += [blind_SN.mean(1) - bare_SN.mean(1), worst_SN.mean(1) - less_SN.mean(1)]
    return replace(found, spread=max(100 * float(each_S.std(ddof=1)) for each_S in by_seed) if len(seeds) > 1 else 0.0)


def _align(*parts: tuple[Sequence[Mapping[str, Entry]], Sequence[str]]) -> list[np.ndarray]:
    """Return for each part, entries by seed and attacks, which samples are right under all of these attacks; `(S, N)`,
    on the samples that all parts have."""
    verdicts = [_right(each, labels) for by_seed, labels in parts for each in by_seed]
    return np.split(np.array(align(verdicts)[1], dtype=float), len(parts))


def _plain(section: Section, subject: Subject, data: str) -> dict[str, Entry]:
    """Return what one subject met, by the attack's label, without worst cases; the section may be another seed's."""
    own = next((s for s in section.subjects if s.key == subject.key), subject)
    found = {a.label: section.get(own, data, a) for a in section.attacks if a.kind != "worst"}
    return {label: entry for label, entry in found.items() if entry is not None and entry.verdicts is not None}


def _right(entries: Mapping[str, Entry], labels: Iterable[str]) -> Verdicts:
    """Return which samples are right under every one of the attacks."""
    positions_N, rights = align([v for label in labels if (v := entries[label].verdicts) is not None])
    return Verdicts(positions_N=positions_N, right_N=np.logical_and.reduce(rights))


def _share(right_SN: np.ndarray) -> Number:
    """Return an accuracy over all seeds, with Wilson's interval for that many samples: seeds share them."""
    n = right_SN.shape[1]
    top1 = 100 * float(right_SN.mean())
    low, high = wilson(top1 / 100 * n, n)
    return Number(top1=top1, low=min(low, top1), high=max(high, top1), n=n)


def _gain(right_SN: np.ndarray, bare_SN: np.ndarray) -> Number:
    """Return the difference of two accuracies on the same samples, in percentage points.

    The interval joins their Wilson limits by their correlation over the samples (Newcombe, Statistics in Medicine 1998,
    method 10 without its correction of continuity).
    """
    one, two = _share(right_SN), _share(bare_SN)
    one_N, two_N = right_SN.mean(0), bare_SN.mean(0)
    phi = float(np.corrcoef(one_N, two_N)[0, 1]) if one_N.std() > 0 and two_N.std() > 0 else 0.0

    def join(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    top1 = one.top1 - two.top1
    low, high = join(one.top1 - one.low, two.high - two.top1), join(one.high - one.top1, two.top1 - two.low)
    return Number(top1=top1, low=top1 - low, high=top1 + high, n=one.n)


def _mean(rulings: Sequence[Ruling]) -> Ruling:
    """Return one subject's average over data sets; its cost is that on the first."""

    def mean(name: str) -> Number | None:
        found = [number for ruling in rulings if (number := getattr(ruling, name)) is not None]
        return average(found) if len(found) == len(rulings) else None

    numbers = {name: mean(name) for name in ("clean", "blind", "worst", "claimed", "left")}
    return replace(rulings[0], **numbers, spread=max(ruling.spread for ruling in rulings))  # type: ignore[arg-type]


def row_names(rulings: Sequence[Ruling]) -> dict[Subject, str]:
    """Return a name for each: without the defence's settings, unless two would be called the same."""
    short = {ruling.subject: re.sub(r":[^+]*", "", ruling.subject.defense) for ruling in rulings}
    count = Counter((*subject.key[:2], name) for subject, name in short.items())
    return {
        s: s.name if count[*s.key[:2], name] > 1 else s.name.replace(f" + {s.defense}", f" + {name}")
        for s, name in short.items()
    }


def referee_grid(hearing: Hearing) -> Grid:
    """Return the table of a hearing."""
    names, measured = row_names(hearing.rulings), any(ruling.overhead for ruling in hearing.rulings)
    costs = ("ms", "forwards", "MiB") if measured else ()
    return Grid(
        title=f"What a defence gains, and what is left: {hearing.title}",
        header=("model", "clean", "blind", "claimed", "all attacks", "left", *costs),
        rows=[
            (
                names[r.subject],
                [
                    *(accuracy(r.clean), accuracy(r.blind), _signed(r.claimed), accuracy(r.worst), _signed(r.left)),
                    *(_costs(r.overhead) if measured else ()),
                ],
            )
            for r in hearing.rulings
        ],
        notes=(*_numbers_notes(hearing, measured=measured), *_protocol_notes(hearing)),
    )


def _signed(number: Number | None) -> Cell:
    """Return a cell with a difference and its interval, bold if that leaves out 0."""
    if number is None:
        return Cell()
    note = f"{number.low:.0f} to {number.high:.0f}".replace("-", "−")
    bold = "higher" if number.low > 0 else "lower" if number.high < 0 else ""
    return Cell(text=format_signed(number.top1), note=note, value=number.top1, emphasis=bold)  # type: ignore[arg-type]


def _costs(overhead: Overhead | None) -> list[Cell]:
    if overhead is None:
        return [Cell(), Cell(), Cell()]
    values = overhead.milliseconds, overhead.forwards, overhead.mebibytes
    return [number_cell(value, ".2f" if value < 1 else ".1f" if value < 100 else ".0f") for value in values]


def _numbers_notes(hearing: Hearing, *, measured: bool) -> Iterator[str]:
    blind, worst = hearing.rulings[0].blind.n, min(ruling.worst.n for ruling in hearing.rulings)
    fewer = f", {worst:,} under all attacks" if worst < blind else ""
    yield f"n = {blind:,} samples{fewer}, 95 % intervals"
    if hearing.seeds > 1:
        spread = max(ruling.spread for ruling in hearing.rulings)
        yield f"Mean over {hearing.seeds} seeds, whose standard deviation is {spread:.1f} points at most"
    yield (
        "Blind: accuracy in % under attacks that ignore the defence, per sample over all of them; all attacks: also "
        "under those through this defence, or through another one. Claimed and left: these less the accuracy of the "
        "undefended model, in points, bold where the interval leaves out 0"
    )
    if measured:
        first = next(ruling.overhead for ruling in hearing.rulings if ruling.overhead is not None)
        yield (
            f"Costs of judging an image, {first.images} at a time on {first.hardware}: milliseconds, floating-point "
            "operations in forwards of the undefended model, and memory"
        )


def _protocol_notes(hearing: Hearing) -> list[str]:
    section = hearing.section
    datasets = section.datasets if hearing.data == AVERAGE else [hearing.data]
    attacks = [a for a in section.attacks if a.kind != "worst" and ball_of(a.settings) in (None, hearing.ball)]
    return [*attack_notes(section, attacks, datasets), *defense_notes(section), shared_note(section)]


def referee_lines(hearing: Hearing) -> Iterator[dict[str, Any]]:
    """Yield one line of CSV per model and defence, gains with their intervals."""
    for ruling in hearing.rulings:
        line: dict[str, Any] = {
            "model": ruling.subject.name,
            "spec": ruling.subject.model.spec,
            "fingerprint": ruling.subject.model.fingerprint,
            "method": ruling.subject.model.method or "",
            "scorer": ruling.subject.scorer,
            "defense": ruling.subject.defense,
            "dataset": hearing.data,
            "kind": "referee",
            "eps": hearing.ball.eps,
            "norm": hearing.ball.norm,
            "n": ruling.blind.n,
            "seeds": hearing.seeds,
        }
        for name in ("clean", "blind", "claimed", "worst", "left"):
            number = getattr(ruling, name)
            if number is not None:
                line[name] = f"{number.top1:.4f}"
                line |= {f"{name}_low": f"{number.low:.4f}", f"{name}_high": f"{number.high:.4f}"}
        line["n_worst"] = ruling.worst.n
        if ruling.overhead is not None:
            for name in ("milliseconds", "forwards", "mebibytes"):
                line[name] = f"{getattr(ruling.overhead, name):.4g}"
        yield line

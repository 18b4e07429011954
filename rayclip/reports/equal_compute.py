"""The table of training methods at equal compute: what each was given, and its difference to one of them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayclip.reports.accuracy import SIGNIFICANT
from rayclip.reports.grid import Cell, Emphasis, Grid, accuracy, format_signed, number_cell
from rayclip.reports.notes import attack_notes, heading, shared_note
from rayclip.reports.section import Attack, Section, Subject


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A training of the table.

    Attributes:
        method: as the table names it.
        seed: trainings with the same seed are compared.
        per_image: passes of an image in a step, see `training.compute`.
        steps: of the training.
        total: passes of the whole training.
        seconds: that its steps took; None if unknown.
    """

    method: str
    seed: int
    per_image: float
    steps: int
    total: float
    seconds: float | None = None


def equal_compute_grid(section: Section, spent: Mapping[str, Spent], baseline: str) -> Grid:
    """Return a row per method: its compute, accuracies, and the difference to the baseline's under the main attack.

    Args:
        spent: by model specification; models that are missing were not trained, and come first.
        baseline: a method.
    """
    clean, robust, data = section.clean, section.main, section.overall
    found: dict[str, dict[int, Subject]] = {}
    for subject in section.subjects:
        run = spent.get(subject.model.spec)
        found.setdefault(run.method if run else subject.name, {})[run.seed if run else 0] = subject
    trained = list(dict.fromkeys(run.method for run in spent.values() if run.method in found))
    rows = []
    for name in [*(name for name in found if name not in trained), *trained]:
        subjects = list(found[name].values())
        runs = [spent[s.model.spec] for s in subjects if s.model.spec in spent]
        cells = [*_compute_cells(runs), _accuracy(section, subjects, clean), _accuracy(section, subjects, robust)]
        others = found.get(baseline, {})
        pairs = [(s, others[seed]) for seed, s in found[name].items() if seed in others and runs and name != baseline]
        rows.append((name, [*cells, *(_difference(section, pairs, a) for a in (clean, robust))]))
    seeds = max(len(each) for each in found.values())
    under = heading(robust.label)
    return Grid(
        title=f"{data}: accuracy in % of methods trained with equal compute",
        header=(
            "method",
            *("passes", "steps", "compute", "seconds", "clean", under, f"clean − {baseline}", f"{under} − {baseline}"),
        ),
        rows=rows,
        notes=(
            "Passes: forward passes of one image through the image encoder that a step computes for each image, with "
            "attack, gradients, texts and the original model in the same unit of floating-point operations",
            "Compute: thousands of passes in the whole training",
            f"Mean ± standard deviation over {seeds} seeds, best in bold; "
            f"a difference is bold if p < {SIGNIFICANT} for every seed"
            if seeds > 1
            else f"95 % intervals; a difference is bold if p < {SIGNIFICANT}",
            "p on the same samples, of McNemar's exact test, or normal for an average over data sets; not corrected for"
            " the number of comparisons",
            *attack_notes(section, [a for a in section.attacks if a.kind != "worst"], section.datasets),
            shared_note(section),
        ),
    )


def _compute_cells(runs: Sequence[Spent]) -> list[Cell]:
    if not runs:
        return [Cell()] * 4
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return [
        number_cell(runs[0].per_image, ".1f"),
        number_cell(runs[0].steps),
        number_cell(runs[0].total / 1000, ".1f"),
        number_cell(statistics.fmean(seconds), ".0f") if seconds else Cell(),
    ]


def _accuracy(section: Section, subjects: Sequence[Subject], attack: Attack | None) -> Cell:
    numbers = [n for s in subjects if attack and (n := section.number(s, section.overall, attack)) is not None]
    return accuracy(numbers[0]) if len(numbers) == 1 else _spread([n.top1 for n in numbers])


def _spread(values: Sequence[float]) -> Cell:
    if not values:
        return Cell()
    mean = statistics.fmean(values)
    return Cell(text=f"{mean:.1f} ± {statistics.stdev(values):.1f}", value=mean)


def _difference(section: Section, pairs: Sequence[tuple[Subject, Subject]], attack: Attack | None) -> Cell:
    """Return the mean difference over pairs of one seed each."""
    tested = [result for pair in pairs if attack and (result := _test(section, *pair, attack)) is not None]
    if not tested:
        return Cell()
    differences, mean = [d for d, _ in tested], statistics.fmean(d for d, _ in tested)
    emphasis: Emphasis = ""
    if all(p < SIGNIFICANT and d * mean > 0 for d, p in tested):
        emphasis = "higher" if mean > 0 else "lower"
    if len(tested) > 1:
        text = f"{format_signed(mean)} ± {statistics.stdev(differences):.1f}"
        return Cell(text=text, value=mean, emphasis=emphasis)
    p = tested[0][1]
    note = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return Cell(text=format_signed(mean), note=note, value=mean, emphasis=emphasis)


def _test(section: Section, one: Subject, other: Subject, attack: Attack) -> tuple[float, float] | None:
    """Return the difference in percentage points, averaged over the data sets, and its two-sided p."""
    found = [section.compare(one, other, dataset, attack) for dataset in section.datasets]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    mean = statistics.fmean(pair.difference for pair in pairs)
    if len(pairs) == 1:
        return mean, pairs[0].p
    # Variance of a mean of paired differences, each +1, 0 or -1
    terms = [(p.first + p.second - (p.first - p.second) ** 2 / p.n) / p.n**2 for p in pairs]
    error = 100 * math.sqrt(sum(terms)) / len(pairs)
    return mean, math.erfc(abs(mean) / error / math.sqrt(2)) if error else 1.0

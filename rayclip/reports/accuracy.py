"""Tables of a section: accuracies by attack or by data set, and the significance of differences."""

from collections.abc import Iterator, Sequence

from rayclip.reports.grid import Cell, Emphasis, Grid, accuracy, format_signed
from rayclip.reports.notes import attack_notes, cut_notes, defense_notes, heading, shared_note, under
from rayclip.reports.section import AVERAGE, Attack, Section, Subject

SIGNIFICANT = 0.05
Column = tuple[str, str, Attack]  # header, data set or `AVERAGE`, attack


def report_grids(section: Section) -> Iterator[Grid]:
    """Yield the tables of a report: the averages, then for each attack a table with a column per data set."""
    yield dataset_grid(section, section.overall)
    if section.overall == AVERAGE:
        for attack in section.attacks:
            columns = [(dataset, dataset, attack) for dataset in section.columns]
            yield _grid(section, f"{heading(attack.label)}: accuracy in %", columns)


def dataset_grid(section: Section, dataset: str) -> Grid:
    """Return the table of a data set, or of the average, with a column per attack."""
    columns = [(heading(attack.label), dataset, attack) for attack in section.attacks]
    several = dataset == AVERAGE
    title = f"average over {len(section.datasets)} data sets" if several else dataset
    notes = ["The average gives every data set the same weight"] if several else []
    return _grid(section, f"{title}: accuracy in %", columns, notes)


def _grid(section: Section, title: str, columns: Sequence[Column], notes: Sequence[str] = ()) -> Grid:
    ranked = [section.ranked(dataset, attack) for _, dataset, attack in columns]
    highest = [max((x.top1 for x in column.values()), default=0.0) for column in ranked]
    rows, partial = [], False
    for subject in section.subjects:
        cells = []
        for column, top, (_, dataset, attack) in zip(ranked, highest, columns, strict=True):
            fewer = section.partial(subject, dataset, attack)
            partial |= fewer
            best = len(column) > 1 and subject in column and column[subject].top1 == top
            cells.append(accuracy(section.number(subject, dataset, attack), best=best, mark="†" if fewer else ""))
        if any(cell.text for cell in cells):
            rows.append((subject.name, cells))
    attacks = list(dict.fromkeys(attack for _, _, attack in columns))
    datasets = list(dict.fromkeys(dataset for _, dataset, _ in columns))
    datasets = section.datasets if AVERAGE in datasets else datasets
    used = [
        (subject.name if len(datasets) == 1 else f"{subject.name} on {dataset}", entry)
        for subject in section.subjects
        for dataset in datasets
        for attack in attacks
        if (entry := section.get(subject, dataset, attack)) is not None
    ]
    return Grid(
        title=title,
        header=("model", *(column for column, _, _ in columns)),
        rows=rows,
        notes=(
            *_sizes(sorted({entry.number.n for _, entry in used}), several=len(rows) > 1),
            *notes,
            *(["† over fewer attacks than the others of its column, and not ranked with them"] if partial else []),
            *attack_notes(section, attacks, datasets),
            *defense_notes(section),
            *cut_notes((owner, entry.cut) for owner, entry in used),
            shared_note(section),
        ),
    )


def _sizes(sizes: Sequence[int], *, several: bool) -> list[str]:
    if not sizes:
        return []
    spelled = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [f"n = {spelled} samples, 95 % Wilson intervals{', best in bold' * several}"]


def significance_grid(section: Section, baseline: Subject) -> Grid:
    """Return a table of each model's difference to the baseline, with McNemar's test.

    One data set: a column per attack. Several: a column per data set, under the main attack.
    """
    several = len(section.datasets) > 1
    columns = (
        [(dataset, dataset, section.main) for dataset in section.datasets]
        if several
        else [(heading(attack.label), section.datasets[0], attack) for attack in section.attacks]
    )
    others = [subject for subject in section.subjects if subject != baseline]
    return Grid(
        title=f"difference to {baseline.name}{f' {under(section.main)}' * several} in percentage points",
        header=("model", *(column for column, _, _ in columns)),
        rows=[(subject.name, [_difference(section, subject, baseline, c) for c in columns]) for subject in others],
        notes=(
            "On the same samples; p of McNemar's exact test, two-sided, not corrected for the number of comparisons",
            f"Bold: p < {SIGNIFICANT}",
        ),
    )


def _difference(section: Section, subject: Subject, baseline: Subject, column: Column) -> Cell:
    _, dataset, attack = column
    found = section.compare(subject, baseline, dataset, attack)
    if found is None:
        return Cell()
    emphasis: Emphasis = ""
    if found.p < SIGNIFICANT:
        emphasis = "higher" if found.difference > 0 else "lower"
    note = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    return Cell(text=format_signed(found.difference), note=note, value=found.difference, emphasis=emphasis)

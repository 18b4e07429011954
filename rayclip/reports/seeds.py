"""Tables of models that differ in their seed only: mean and standard deviation in place of a row per seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayclip.reports.formats import grid_markdown
from rayclip.reports.grid import Cell, Grid, number_cell
from rayclip.reports.notes import heading
from rayclip.reports.rows import markdown_tables, result_grids
from rayclip.types import Row

_PARTIAL = "†"  # marks a worst case over fewer attacks (`accuracy.dataset_grid`)


def seed_grids(rows: Sequence[Row], labels: Mapping[str, str], groups: Mapping[str, str]) -> list[Grid]:
    """Return the tables of `rows.result_grids` with a row for each group of models.

    Args:
        labels: display names by model specification.
        groups: display names without the seed, by model specification; a model without one stays as it is.
    """
    shared = {**labels, **groups}
    names = {row.who(labels): row.who(shared) for row in rows}
    return [merge_rows(grid, names) for grid in result_grids(rows, labels)]


def tables_of_seeds(rows: Sequence[Row], labels: Mapping[str, str], groups: Mapping[str, str]) -> str:
    """Return the tables in Markdown: if models differ in their seed, those of `seed_grids`, then those of each seed."""
    means = [grid_markdown(grid) for grid in seed_grids(rows, labels, groups)] if groups else []
    return "\n\n".join([*means, markdown_tables(rows, labels)])


def merge_rows(grid: Grid, names: Mapping[str, str]) -> Grid:
    """Return the table with one row for all rows that share a name in `names`, in the order of appearance.

    Its numbers are `mean ± sd` over these rows: the sample standard deviation, with n - 1. A column's best mean is
    bold, and a row that is alone keeps its intervals.
    """
    groups: dict[str, list[Sequence[Cell]]] = {}
    for name, cells in grid.rows:
        groups.setdefault(names.get(name, name), []).append(cells)
    sizes = sorted({len(members) for members in groups.values() if len(members) > 1})
    if not sizes:
        return grid
    merged = {name: [_merge(column) for column in zip(*members, strict=True)] for name, members in groups.items()}
    highest = [
        max(
            (cell.value for cell in column if cell.value is not None and not cell.text.endswith(_PARTIAL)), default=None
        )
        for column in zip(*merged.values(), strict=True)
    ]
    seeds = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return replace(
        grid,
        rows=[
            (
                name,
                [
                    replace(c, emphasis="best" if c.value == top is not None else "")
                    for c, top in zip(cells, highest, strict=True)
                ],
            )
            for name, cells in merged.items()
        ],
        notes=(f"Mean ± standard deviation over {seeds} seeds", *grid.notes),
    )


def trained_numbers(lineage: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in a finished checkpoint's lineage: the last step's `loss` and, of a validated run, accuracies
    in percent of the last epoch and of the best one: `clean`, `best clean`."""
    found = {"loss": lineage["loss"]} if "loss" in lineage else {}
    validation = lineage.get("validation")
    for kind, scores in (("", validation["history"][-1]), ("best ", validation["best"])) if validation else ():
        found |= {f"{kind}{name}": value for name, value in scores.items() if name not in ("epoch", "step")}
    return found


def training_grid(numbers: Mapping[str, Mapping[str, float]]) -> Grid:
    """Return a table of trainings that differ in their seed only, by name, with their mean as the last row."""
    columns = list(dict.fromkeys(name for each in numbers.values() for name in each))

    def row(each: Mapping[str, float]) -> list[Cell]:
        return [number_cell(each[c], ".4f" if c == "loss" else ".1f") if c in each else Cell() for c in columns]

    grid = Grid(
        title="training: loss of the last step" + ", accuracy in % on held-out images" * (len(columns) > 1),
        header=("run", *(f"best {heading(c[5:])}" if c.startswith("best ") else heading(c) for c in columns)),
        rows=[(name, row(each)) for name, each in numbers.items()],
    )
    mean = merge_rows(grid, dict.fromkeys(numbers, "mean"))
    return mean if mean is grid else replace(grid, rows=[*grid.rows, *mean.rows], notes=mean.notes)


def spread(numbers: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return (mean, sample standard deviation) of each number that all of two or more have."""
    shared = [name for name in (numbers[0] if len(numbers) > 1 else ()) if all(name in each for each in numbers)]
    values = {name: [each[name] for each in numbers] for name in shared}
    return {name: (statistics.fmean(each), statistics.stdev(each)) for name, each in values.items()}


def _merge(cells: Sequence[Cell]) -> Cell:
    found = [cell for cell in cells if cell.value is not None]
    values = [cell.value for cell in found if cell.value is not None]
    if len(found) < 2:
        return found[0] if found else Cell()
    mark = _PARTIAL if any(cell.text.endswith(_PARTIAL) for cell in found) else ""
    mean = statistics.fmean(values)
    digits = max(1, *(len(cell.text.removesuffix(_PARTIAL).partition(".")[2]) for cell in found))
    return Cell(text=f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}{mark}", value=mean)

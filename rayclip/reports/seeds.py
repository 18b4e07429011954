"""Tables of models that differ in their seed only: mean and standard deviation in place of a row per seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rayclip.reports.grid import Cell, Grid
from rayclip.reports.rows import result_grids
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


def _merge(cells: Sequence[Cell]) -> Cell:
    found = [cell for cell in cells if cell.value is not None]
    values = [cell.value for cell in found if cell.value is not None]
    if len(found) < 2:
        return found[0] if found else Cell()
    mark = _PARTIAL if any(cell.text.endswith(_PARTIAL) for cell in found) else ""
    mean = statistics.fmean(values)
    return Cell(text=f"{mean:.1f} ± {statistics.stdev(values):.1f}{mark}", value=mean)

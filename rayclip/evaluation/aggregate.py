"""From verdicts to numbers: accuracy with 95 % Wilson intervals, and the worst case per sample."""

import math
from collections.abc import Sequence

import numpy as np

from rayclip.defenses import chain_label
from rayclip.evaluation.cell import Cell
from rayclip.store import Store
from rayclip.types import Cut, Row, UserError

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, in percent (Wilson 1927)."""
    p, z2 = right / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def collect_rows(cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store) -> list[Row]:
    """One row a cell, and where a model with its defence met several attacks on a data set, a row `worst`: right under
    all of them.

    Args:
        positions: the samples that count, by data specification.

    Raises:
        UserError: results are missing.
    """
    rows: list[Row] = []
    for members in same_subject(cells):
        data = members[0].data
        verdicts = [right_after_attack(cell, positions[data], store) for cell in members]
        rows += [
            _row(cell, cell.attack_label, right, _cut(cell, store))
            for cell, right in zip(members, verdicts, strict=True)
        ]
        if len(members) > 2 or (len(members) == 2 and all(c.attack.name != "clean" for c in members)):
            rows.append(_worst(members, np.logical_and.reduce(verdicts)))
    return rows


def same_subject(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells grouped by what is judged: model, scorer, defence and data set."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.scorer.label, chain_label(cell.defense), cell.data), []).append(cell)
    return list(groups.values())


def right_after_attack(cell: Cell, positions: np.ndarray, store: Store) -> np.ndarray:
    """For each position, whether the image was right before and after the attack (bool)."""
    table = store.read_tables(
        store.names(f"cells/{cell.id}", ".parquet"), ["position", "label", "clean_pred", "adv_pred"]
    )
    verdict: dict[int, bool] = {}
    if table is not None:
        columns = {name: table[name].to_numpy() for name in table.column_names}
        right = (columns["clean_pred"] == columns["label"]) & (columns["adv_pred"] == columns["label"])
        verdict = dict(zip(columns["position"].tolist(), right.tolist(), strict=True))
    absent = sum(int(p) not in verdict for p in positions)
    if absent:
        raise UserError(
            f"{absent} samples of '{cell.dataset}' under {cell.attack_label} have no result yet: run again."
        )
    return np.array([verdict[int(p)] for p in positions])


def _cut(cell: Cell, store: Store) -> Cut:
    """How many texts were cut, from the cell's record where that was not counted now."""
    return cell.cut if cell.cut is not None else Cut.read(store.read_json(f"cells/{cell.id}/cell.json") or {})


def _row(cell: Cell, label: str, right: np.ndarray, cut: Cut) -> Row:
    low, high = wilson(int(right.sum()), len(right))
    return Row(
        model=cell.model,
        dataset=cell.dataset,
        attack=label,
        eps=cell.eps,
        steps=getattr(cell.attack, "steps", None),
        n=len(right),
        top1=100 * float(right.mean()),
        ci_low=low,
        ci_high=high,
        protocol=cell.describe(),
        cell=cell.id,
        defense=chain_label(cell.defense),
        scorer=cell.scorer.label,
        **cut.recorded(),
    )


def _worst(members: list[Cell], right: np.ndarray) -> Row:
    low, high = wilson(int(right.sum()), len(right))
    first = members[0]
    protocol = {"worst_of": [cell.attack_label for cell in members], "per": "sample"}
    return Row(
        model=first.model,
        dataset=first.dataset,
        attack="worst",
        eps=first.protocol.eps,
        steps=None,
        n=len(right),
        top1=100 * float(right.mean()),
        ci_low=low,
        ci_high=high,
        protocol=protocol,
        cell="+".join(cell.id for cell in members),
        defense=chain_label(first.defense),
        scorer=first.scorer.label,
    )

"""Aggregate verdicts into accuracies with 95 % Wilson intervals, and into the worst case per sample."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rayclip.defenses import chain_label
from rayclip.evaluation.cell import Cell, positions_of
from rayclip.store import Store
from rayclip.types import WORST, Cut, Row, UserError

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, in percent (Wilson 1927)."""
    p, z2 = right / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


class Ball(NamedTuple):
    """The threat model of an image attack, as its protocol states it: the norm, and the budget as it is written."""

    norm: str
    eps: str


def ball_of(protocol: Mapping[str, Any]) -> Ball | None:
    """Return a protocol's ball; None for an attack without a budget, such as one on texts alone."""
    return Ball(protocol.get("norm", "linf"), protocol["eps"]) if "eps" in protocol else None


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """The worst case over the attacks within one ball and those that need no budget: right before and after every one.

    Attributes:
        ball: None if no attack has a budget.
        label: `worst`; with several balls `worst_eps1`, `worst_l2_eps127.5`.
    """

    ball: Ball | None
    label: str

    def includes(self, protocol: Mapping[str, Any]) -> bool:
        return ball_of(protocol) in (None, self.ball)

    def of(self, protocols: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the indices of the attacks that take part; none if fewer than two attack, as that is no worst case."""
        within = [i for i, protocol in enumerate(protocols) if self.includes(protocol)]
        return within if sum(protocols[i]["attack"] != "clean" for i in within) > 1 else []

    def described(self) -> dict[str, str]:
        """Return norm and budget as a protocol states them."""
        return {} if self.ball is None else self.ball._asdict()


def worst_cases(protocols: Iterable[Mapping[str, Any]]) -> list[WorstCase]:
    """Return the worst cases of attacks with these protocols, one per ball, which are never mixed; l_inf and small
    budgets first."""

    def size(ball: Ball) -> Fraction:
        numerator, _, denominator = ball.eps.partition("/")
        return Fraction(numerator) / Fraction(denominator or 1)

    def label(ball: Ball) -> str:
        norm = "" if ball.norm == "linf" else f"_{ball.norm}"
        return f"{WORST}{norm}_eps{ball.eps.removesuffix('/255')}"

    found = {ball for protocol in protocols if (ball := ball_of(protocol)) is not None}
    if len(found) < 2:
        return [WorstCase(ball=next(iter(found), None), label=WORST)]
    balls = sorted(found, key=lambda ball: (ball.norm != "linf", ball.norm, size(ball)))
    return [WorstCase(ball=ball, label=label(ball)) for ball in balls]


def worst_accuracy(rows: Sequence[Row]) -> float | None:
    """Return one model's worst-case accuracy, averaged over budgets and data sets; None if nothing was attacked."""
    attacked = [row for row in rows if row.attack != "clean"]
    lowest: dict[tuple[str, str], float] = {}
    for case in worst_cases([row.protocol for row in attacked]):
        for row in attacked:
            if case.includes(row.protocol):
                key = case.label, row.dataset
                lowest[key] = min(row.top1, lowest.get(key, row.top1))
    return sum(lowest.values()) / len(lowest) if lowest else None


def collect_rows(cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store) -> list[Row]:
    """Return one row per cell, and one per worst case: where a model met several attacks within a ball on a data set.

    Args:
        positions: of the samples to count (`positions_of`).

    Raises:
        UserError: results are missing.
    """
    rows: list[Row] = []
    protocols = [cell.describe() for cell in cells]
    cases = worst_cases(protocols)
    asked = [(subject_of(cell), cell.attack_label, p) for cell, p in zip(cells, protocols, strict=True)]
    labels = dict(zip(cells, distinct_labels(asked), strict=True))
    for members in group_by_subject(cells, positions):
        at = positions_of(members[0], positions)
        verdicts = [right_after_attack(cell, at, store) for cell in members]
        found = [_row(cell, labels[cell], right, at, store) for cell, right in zip(members, verdicts, strict=True)]
        rows += found
        for case in cases:
            within = case.of([row.protocol for row in found])
            if within:
                right = np.logical_and.reduce([verdicts[i] for i in within])
                parts = [found[i] for i in within]
                worst = replace(
                    parts[0],
                    attack=case.label,
                    eps=next((row.eps for row in parts if row.eps is not None), None),
                    steps=None,
                    protocol={"worst_of": [row.attack for row in parts], "per": "sample", **case.described()},
                    cell="+".join(row.cell for row in parts),
                    **_accuracy(right),
                    mean=None,
                    cut_texts=0,
                    cut_for_substitutes=0,
                )
                rows.append(worst)
    return rows


def group_by_subject(cells: Sequence[Cell], positions: Mapping[str, np.ndarray]) -> list[list[Cell]]:
    """Return the cells grouped by model, scorer, defence, data set with the samples of it, and the settings without
    which numbers cannot be compared."""
    contents = {id(samples): samples.tobytes() for samples in positions.values()}  # most cells share theirs
    groups: dict[tuple[Hashable, ...], list[Cell]] = {}
    for cell in cells:
        said = cell.protocol
        shared = said.seed, said.resolution, said.resize, said.names, said.template
        samples = contents[id(positions_of(cell, positions))]
        groups.setdefault((*subject_of(cell), *shared, samples), []).append(cell)
    return list(groups.values())


def subject_of(cell: Cell) -> tuple[str, ...]:
    """Return what a cell evaluates: model, scorer, defence and data set."""
    return cell.model, cell.scorer.label, chain_label(cell.defense), cell.data


def distinct_labels(attacks: Sequence[tuple[Hashable, str, Mapping[str, Any]]]) -> list[str]:
    """Return a column name for each (subject, attack label, protocol): the label.

    Where one subject met several attacks of that label, the settings that differ are added: `pgd-10_eps1 step 0.5/255`.
    """
    alike: dict[tuple[Hashable, str], list[Mapping[str, Any]]] = {}
    for subject, label, protocol in attacks:
        alike.setdefault((subject, label), []).append(protocol)
    differing: dict[str, set[str]] = {}
    for (_, label), several in alike.items():
        keys = {key for protocol in several for key in protocol}
        differing.setdefault(label, set()).update(
            k for k in keys if any(p.get(k) != several[0].get(k) for p in several)
        )
    return [
        " ".join([label, *(f"{key} {protocol.get(key, 'none')}" for key in sorted(differing[label]))])
        for _, label, protocol in attacks
    ]


def right_after_attack(cell: Cell, positions: np.ndarray, store: Store) -> np.ndarray:
    """Return for each position whether the prediction was right before and after the attack (bool); raise a `UserError`
    if one has no result yet."""
    columns = dict.fromkeys(("position", "label", "clean_pred", "adv_pred"), int)
    table = store.read_tables(store.names(f"cells/{cell.id}", ".parquet"), columns)
    verdict: dict[int, bool] = {}
    if table is not None:
        position, label, clean, adversarial = (table[name].to_numpy() for name in columns)
        verdict = dict(zip(position.tolist(), ((clean == label) & (adversarial == label)).tolist(), strict=True))
    absent = sum(int(p) not in verdict for p in positions)
    if absent:
        raise UserError(
            f"{absent} samples of '{cell.dataset}' under {cell.attack_label} have no result yet: run again."
        )
    return np.array([verdict[int(p)] for p in positions])


def mean_of_judgements(cell: Cell, positions: np.ndarray, store: Store) -> float:
    """Return the accuracy in percent, averaged over the judgements of each sample."""
    columns = {**dict.fromkeys(("position", "label", "clean_pred"), int), "right_share": float}
    table = store.read_tables(store.names(f"cells/{cell.id}", ".parquet"), columns)
    assert table is not None  # `right_after_attack` has read it
    position, label, clean, share = (table[name].to_numpy() for name in columns)
    counted = np.isin(position, positions)
    times = np.where(clean == label, np.rint(share * cell.judgements), 0)[counted]
    return 100 * float(times.mean()) / cell.judgements


def _row(cell: Cell, label: str, right: np.ndarray, positions: np.ndarray, store: Store) -> Row:
    cut = cell.cut if cell.cut is not None else Cut.read(store.read_json(f"cells/{cell.id}/cell.json", dict) or {})
    mean = None if cell.judgements == 1 else mean_of_judgements(cell, positions, store)
    return Row(
        model=cell.model,
        dataset=cell.dataset,
        attack=label,
        eps=cell.eps,
        steps=getattr(cell.attack, "steps", None),
        protocol=cell.describe(),
        cell=cell.id,
        defense=chain_label(cell.defense),
        scorer=cell.scorer.label,
        mean=mean,
        **_accuracy(right),
        **cut.recorded(),
    )


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    low, high = wilson(int(right.sum()), len(right))
    return {"n": len(right), "top1": 100 * float(right.mean()), "ci_low": low, "ci_high": high}

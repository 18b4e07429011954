"""Signs that an attack failed rather than that a model is robust (Athalye et al. 2018; Carlini et al. 2019)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayclip.attacks import Attack
from rayclip.defenses import IGNORE
from rayclip.evaluation.aggregate import group_by_subject
from rayclip.evaluation.cell import Cell, positions_of
from rayclip.evaluation.retrieval import RecallRow
from rayclip.store import Store
from rayclip.types import Cut, Row

_POINTS = 0.5  # percentage points of accuracy: a smaller difference may be chance
_MARGIN_DROP = 0.01  # share of the clean margin: the attack's random start alone lowers it by less
_HUGE_EPS = 0.5  # l_inf: any image can be turned plain grey
_LARGE_EPS = 32 / 255  # l_inf: no defence holds images that can change this much


def alarms(cells: Sequence[Cell], rows: Sequence[Row], positions: Mapping[str, np.ndarray], store: Store) -> list[str]:
    """Return warnings for a reader of these numbers, one sentence each.

    - a gradient attack that hardly lowers the margin of the images it attacks;
    - an attack without gradients that breaks more than every attack with gradients;
    - more steps that break less;
    - accuracy above chance within a budget that can erase any image;
    - an attack through a defence that breaks less than the same attack that ignores the defence;
    - verdicts of a random defence that differ between its judgements by more than the interval of their number;
    - an attack through a defence that breaks no more with a budget of 32/255 or more than with a smaller one.
    """
    by_id = {row.cell: row for row in rows}
    found = []
    for members in group_by_subject(cells, positions):
        attacking = [(cell, by_id[cell.id]) for cell in members if cell.attack.needs_eps]
        found += _aim_loses(attacking) + _verdicts_change([by_id[cell.id] for cell in members])
        # An attack that ignores the defence, or is made against another scorer, says nothing about gradients
        attacking = [(cell, row) for cell, row in attacking if not cell.defense or cell.aim.is_adaptive]
        attacking = [(cell, row) for cell, row in attacking if cell.attacked == cell.scorer]
        for cell, row in attacking:
            found += _flat_loss(cell, row, positions_of(cell, positions), store) + _survives_all(cell, row)
        found += _budget_is_no_use(attacking)
        balls = dict.fromkeys((cell.attack.ball, cell.eps) for cell, _ in attacking)
        for ball in balls:  # accuracies within different balls cannot be compared
            alike = [(cell, row) for cell, row in attacking if (cell.attack.ball, cell.eps) == ball]
            found += _gradients_lose(alike) + _steps_lose(alike)
    return found


def cut_alarms(rows: Sequence[Row | RecallRow]) -> list[str]:
    """Return one warning for each model and data set with texts that were truncated."""
    most: dict[tuple[str, str], Cut] = {}
    for row in rows:
        before = most.get((row.model, row.dataset), Cut())
        most[row.model, row.dataset] = Cut(*map(max, before, (row.cut_texts, row.cut_for_substitutes)))
    found = []
    for (model, dataset), cut in most.items():
        whats = [
            f"{count:,} text{'s are' if count > 1 else ' is'} {what}"
            for count, what in (
                (cut.texts, "longer than what the model reads and cut at its context length"),
                (cut.substitutes, "longer than what the masked language model reads (max_length), and keep their ends"),
            )
            if count
        ]
        found += [f"{model} on {dataset}: {' and '.join(whats)}: what stands beyond counts for nothing."] * bool(whats)
    return found


def _where(row: Row) -> str:
    return f"{row.who()} on {row.dataset}, {row.attack}"


def _flat_loss(cell: Cell, row: Row, positions: np.ndarray, store: Store) -> list[str]:
    if cell.attack.black_box or not row.eps:
        return []
    whole, real = ("position", "label", "clean_pred"), ("clean_margin", "adv_margin")
    columns = {**dict.fromkeys(whole, int), **dict.fromkeys(real, float)}
    table = store.read_tables(store.names(f"cells/{cell.id}", ".parquet"), columns)
    if table is None:
        return []
    values = {name: table[name].to_numpy() for name in columns}
    attacked = (values["clean_pred"] == values["label"]) & np.isin(values["position"], positions)
    if not attacked.any():
        return []
    before, after = (float(values[name][attacked].mean()) for name in ("clean_margin", "adv_margin"))
    if before - after > _MARGIN_DROP * abs(before):
        return []
    return [
        f"{_where(row)}: the attack hardly lowers the margin of the images it attacks ({before:.3g} to {after:.3g}): "
        "the model's gradients may be masked."
    ]


def _survives_all(cell: Cell, row: Row) -> list[str]:
    chance = 100 / len(cell.class_names)
    if cell.attack.ball != "linf" or row.eps is None or row.eps < _HUGE_EPS or row.ci_low <= chance:
        return []
    return [f"{_where(row)}: {row.top1:.1f} % survive a budget that can erase any image: the attack fails."]


def _gradients_lose(attacking: Sequence[tuple[Cell, Row]]) -> list[str]:
    white = [row for cell, row in attacking if not cell.attack.black_box]
    if not white:
        return []
    best = min(white, key=lambda row: row.top1)
    return [
        f"{_where(row)} needs no gradients and leaves {row.top1:.1f} %, {best.attack} leaves {best.top1:.1f} %: the "
        "model's gradients may be masked."
        for cell, row in attacking
        if cell.attack.black_box and row.top1 < best.top1 - _POINTS
    ]


def _aim_loses(attacking: Sequence[tuple[Cell, Row]]) -> list[str]:
    ignoring = {cell.attack: row for cell, row in attacking if cell.defense and cell.aim == IGNORE}
    return [
        f"{_where(row)} goes through the defence and leaves {row.top1:.1f} %, more than the same attack that ignores "
        f"it ({ignoring[cell.attack].top1:.1f} %): the defence hides its gradients; judge it by the lower number."
        for cell, row in attacking
        if cell.aim.is_adaptive and cell.attack in ignoring and row.top1 > ignoring[cell.attack].top1 + _POINTS
    ]


def _verdicts_change(rows: Sequence[Row]) -> list[str]:
    return [
        f"{_where(row)}: {row.top1:.1f} % are right in all {row.protocol['judgements']} judgements, {row.mean:.1f} % "
        "in their mean: a single judgement of this random defence says little."
        for row in rows
        if row.mean is not None and row.mean > row.ci_high
    ]


def _budget_is_no_use(attacking: Sequence[tuple[Cell, Row]]) -> list[str]:
    """An attack through a defence, at its smallest budget and at its largest, if that is large."""
    alike: dict[Any, list[tuple[float, Row]]] = {}
    for cell, row in attacking:
        if cell.defense and cell.eps and cell.attack.ball == "linf":
            alike.setdefault((replace(cell.attack, eps=None, **_no_step(cell.attack)), cell.aim), []).append(
                (cell.eps, row)
            )
    found = []
    for rows in alike.values():
        (small, low), (large, high) = (pick(rows, key=lambda one: one[0]) for pick in (min, max))
        if small < large and large >= _LARGE_EPS - 1e-9 and high.top1 > low.top1 - _POINTS and high.top1 > 0:
            found.append(
                f"{_where(high)} leaves {high.top1:.1f} %, no less than {low.attack} with the smaller budget "
                f"({low.top1:.1f} %): the attack does not get through the defence."
            )
    return found


def _no_step(attack: Attack) -> dict[str, None]:
    """The length of a step follows from the budget."""
    return {"step": None} if "step" in attack.settings() else {}


def _steps_lose(attacking: Sequence[tuple[Cell, Row]]) -> list[str]:
    found = []
    for cell, row in attacking:
        for other, more in attacking:
            alike = (cell.attack.name, cell.aim) == (other.attack.name, other.aim)
            if not alike or row.steps is None or more.steps is None:
                continue
            if row.steps < more.steps and more.top1 > row.top1 + _POINTS:
                found.append(
                    f"{_where(more)} leaves {more.top1:.1f} %, more than {row.attack} with fewer steps "
                    f"({row.top1:.1f} %): the steps are too long, or gradients masked."
                )
    return found

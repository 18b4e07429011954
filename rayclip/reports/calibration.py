"""Calibration: how far a model's confidence is from its accuracy (expected calibration error, reliability).

Shapes: N samples, M bins of confidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayclip.reports.grid import Cell, Grid, Part, number_cell
from rayclip.reports.notes import heading, shared_note
from rayclip.reports.results import confidences
from rayclip.reports.section import AVERAGE, Attack, Section, Subject

BINS = 15
_MISSING = "Some or all cells were evaluated before confidences were kept with the verdicts: evaluate them anew"


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Samples in bins of equal width of confidence.

    Attributes:
        count_M: number of samples.
        confidence_M, accuracy_M: their means, 0..1; 0 in empty bins.
    """

    count_M: np.ndarray
    confidence_M: np.ndarray
    accuracy_M: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error in percent: the mean of |accuracy - confidence| over samples (Guo et al., ICML
        2017, eq. 3)."""
        gaps_M = np.abs(self.accuracy_M - self.confidence_M)
        return float(100 * (self.count_M * gaps_M).sum() / self.count_M.sum())

    @property
    def confidence(self) -> float:
        """Mean confidence in percent."""
        return float(100 * (self.count_M * self.confidence_M).sum() / self.count_M.sum())


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = BINS) -> Reliability:
    """Bin predictions by confidence: bin m of M holds ((m-1)/M, m/M]."""
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    count_M, total_M, right_M = (
        np.bincount(bin_N, weights=weights, minlength=bins) for weights in (None, confidence_N, right_N)
    )
    some_M = np.maximum(count_M, 1)
    return Reliability(count_M=count_M, confidence_M=total_M / some_M, accuracy_M=right_M / some_M)


Calibrations = Mapping[tuple[Subject, str, str], Reliability]  # by subject, data set and attack's label


def calibrate(section: Section) -> Calibrations:
    """Return the reliability behind every number of a section whose cells have confidences."""
    found = {}
    for key, entry in section.entries.items():
        if len(entry.cells) == 1 and (made := confidences(entry.cells[0])) is not None:
            found[key] = reliability(*made)
    return found


def calibration_part(section: Section, found: Calibrations) -> Part:
    """Return the report's part: a table of expected calibration errors, averages as in the papers, and what lacks."""
    attacks = [attack for attack in section.attacks if attack.kind != "worst"]
    rows, lacking = [], False
    for subject in section.subjects:
        cells = []
        for attack in attacks:
            keys = [(subject, dataset, attack.label) for dataset in section.datasets]
            ours = [found[key] for key in keys if key in found]
            lacking |= any(key in section.entries and key not in found for key in keys)
            whole = ours and len(ours) == len(keys)
            cells.append(number_cell(sum(x.ece for x in ours) / len(ours), ".1f") if whole else Cell())
        if any(cell.text for cell in cells):
            rows.append((subject.name, cells))
    if not rows:
        return Part(title="Calibration", text=(f"{_MISSING}.",))
    several = section.overall == AVERAGE
    where = f"average over {len(section.datasets)} data sets" if several else section.overall
    notes = (
        f"Mean distance of confidence and accuracy in {BINS} bins; confidence: softmax of the class that is predicted",
        "Under an attack, of the predictions on the attacked images",
        *([_MISSING] if lacking else []),
        shared_note(section),
    )
    header = ("model", *(heading(attack.label) for attack in attacks))
    return Part(
        title="Calibration",
        grids=(Grid(title=f"{where}: expected calibration error in %", header=header, rows=rows, notes=notes),),
    )


def pooled(section: Section, found: Calibrations, subject: Subject, attack: Attack) -> Reliability | None:
    """Return the reliability over the samples of all data sets; None if one is missing."""
    ours = [found.get((subject, dataset, attack.label)) for dataset in section.datasets]
    whole = [x for x in ours if x is not None]
    if len(whole) < len(ours):
        return None
    count_M = np.sum([x.count_M for x in whole], axis=0)
    means = (
        np.sum([x.count_M * getattr(x, name) for x in whole], axis=0) / np.maximum(count_M, 1)
        for name in ("confidence_M", "accuracy_M")
    )
    return Reliability(count_M=count_M, confidence_M=next(means), accuracy_M=next(means))

"""The numbers of a report as CSV, one line per number."""

import csv
import io
from typing import Any

from rayclip.reports.grid import Document
from rayclip.reports.section import Attack, Number, Subject


def document_csv(document: Document) -> str:
    """Return a report's lines; accuracies, recalls and comparisons have some columns of their own."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for line in document.lines for name in line))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(document.lines)
    return buffer.getvalue()


def number_line(subject: Subject, dataset: str, attack: Attack, number: Number, metric: str = "") -> dict[str, Any]:
    """Return the columns that every line has: the subject, the data, the attack, the number and its interval.

    Args:
        metric: of a recall, such as `tr_r@1`; without it the number is an accuracy.
    """
    model = subject.model
    shots = "full" if model.shots is None else str(model.shots)
    value = f"{number.top1:.4f}"
    return {
        "model": subject.name,
        "spec": model.spec,
        "fingerprint": model.fingerprint,
        "method": model.method or "",
        "trained_on": model.trained_on or "",
        "shots": "" if model.method is None else shots,
        "scorer": subject.scorer,
        "defense": subject.defense,
        "dataset": dataset,
        "attack": attack.label,
        "kind": attack.kind,
        "eps": attack.eps or "",
        "norm": attack.norm if attack.eps is not None else "",
        "n": number.n,
        **({"metric": metric, "recall": value} if metric else {"top1": value}),
        "ci_low": f"{number.low:.4f}",
        "ci_high": f"{number.high:.4f}",
    }

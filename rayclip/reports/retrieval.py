"""The retrieval table: a row a model, recall at 1, 5, 10 of text for an image (TR) and of an image for a text (IR)."""

from collections.abc import Sequence

from rayclip.evaluation.retrieval import RecallRow
from rayclip.reports.table import Table


def retrieval_table(rows: Sequence[RecallRow]) -> Table:
    """One data set's rows."""
    columns = list(dict.fromkeys((row.direction, row.k) for row in rows))
    found = {(row.model, row.direction, row.k): row for row in rows}
    body = tuple(
        (model, *(_number(found[model, direction, k]) for direction, k in columns))
        for model in dict.fromkeys(row.model for row in rows)
    )
    protocol = rows[0].protocol
    n = f"{protocol['images']} images (TR) and {protocol['captions']} captions (IR)"
    return Table(
        title=f"{rows[0].dataset}: recall in %, n = {n}, 95 % Wilson intervals",
        header=("model", *(f"{direction.upper()}@{k}" for direction, k in columns)),
        body=body,
        caption="TR: any caption of the image among the first k; IR: the caption's image among the first k; ties count "
        f"{protocol['ties']}. {protocol['text'].capitalize()}, {protocol['resolution']} resolution, "
        f"{protocol['precision']}.",
    )


def _number(row: RecallRow) -> str:
    recall = "100" if row.recall == 100 else f"{row.recall:.1f}"
    return f"{recall} {row.ci_low:.0f}–{row.ci_high:.0f}"

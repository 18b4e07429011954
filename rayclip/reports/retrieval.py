"""Retrieval tables: recall at 1, 5, 10 of texts for an image (TR) and of images for a text (IR)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rayclip.evaluation.retrieval import AS_WRITTEN, RecallRow
from rayclip.reports.table import Table, cut_notes, heading, in_one_breath, resolution_note
from rayclip.types import Cut

_SETTINGS = (
    ("steps", "step", "norm", "start", "stop", "seed", "classes"),
    ("substitutes", "k", "changes", "threshold", "offset", "combinations", "max_length"),
    ("text_weight", "scales", "noise"),
)


def retrieval_tables(rows: Sequence[RecallRow]) -> list[Table]:
    """Return the tables of one data set: a row per model, or with attacks a table per model and a row per attack."""
    if {row.attack for row in rows} == {"clean"}:
        return [_table(rows, "model", rows[0].dataset)]
    models = dict.fromkeys(row.model for row in rows)
    return [
        _table([r for r in rows if r.model == model], "attack", f"{model} on {rows[0].dataset}") for model in models
    ]


def _table(rows: Sequence[RecallRow], first: str, title: str) -> Table:
    columns = list(dict.fromkeys((row.direction, row.k) for row in rows))
    found = {(getattr(row, first), row.direction, row.k): row for row in rows}
    names = list(dict.fromkeys(getattr(row, first) for row in rows))
    described = {row.attack: row.protocol for row in rows}
    protocol = rows[0].protocol
    cut = cut_notes((r.model, Cut(r.cut_texts, r.cut_for_substitutes)) for r in rows)
    return Table(
        title=f"{title}: recall in %, n = {protocol['images']} images (TR) and {protocol['captions']} captions (IR), "
        "95 % Wilson intervals",
        header=(first, *(f"{direction.upper()}@{k}" for direction, k in columns)),
        body=tuple(
            (heading(n) if first == "attack" else n, *(_number(found[n, d, k]) for d, k in columns)) for n in names
        ),
        caption="".join(f"{note}. " for note in (*protocol_notes(described), *cut)).strip(),
    )


def protocol_notes(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return notes: what counts as found, the attacks' settings (grouped if equal), and the settings common to all.

    Args:
        described: protocols by attack label, of one data set; not empty.
    """
    protocol = next(iter(described.values()))
    notes = [
        "TR: any caption of the image among the first k; IR: the caption's image among the first k; ties count "
        f"{protocol['ties']}"
    ]
    for keys in _SETTINGS:
        notes += in_one_breath(
            (heading(attack), settings)
            for attack, protocol in described.items()
            if (settings := ", ".join(f"{k} {protocol[k]}" for k in keys if k in protocol))
        )
    changed = [heading(attack) for attack, p in described.items() if p["text"] != AS_WRITTEN]
    text = f"{AS_WRITTEN}{', adversarial under ' + ', '.join(changed) if changed else ''}"
    return [*notes, f"{text.capitalize()}, {resolution_note(protocol)}, {protocol['precision']}"]


def _number(row: RecallRow) -> str:
    recall = "100" if row.recall == 100 else f"{row.recall:.1f}"
    return f"{recall} {row.ci_low:.0f}–{row.ci_high:.0f}"

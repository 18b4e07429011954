"""Tables of prompts before and after a text attack, with the words that changed."""

import difflib
from collections.abc import Iterator

from rayclip.reports.choosing import choose_examples
from rayclip.reports.grid import Cell, Grid, Part
from rayclip.reports.notes import heading
from rayclip.reports.results import texts
from rayclip.reports.section import Section

_MOST = 8


def prompt_part(section: Section) -> Part:
    """Return a part with a table per model, of its first prompts; empty if the evaluation kept none."""
    grids = []
    for example in choose_examples(section, ("text", "multimodal"), lambda cell: bool(texts(cell))):
        rows = []
        for row in texts(example.cell)[:_MOST]:
            changes = ", ".join(changed_words(row["clean"], row["adversarial"]))
            rows.append((row["class"], [Cell(text=text) for text in (row["clean"], row["adversarial"], changes)]))
        where = f"{example.subject.name} on {example.dataset} before and after {heading(example.attack.label)}"
        header = ("class", "prompt", "attacked", "changed words")
        grids.append(Grid(title=where, header=header, rows=rows))
    return Part(title="Attacked prompts", grids=grids)


def changed_words(before: str, after: str) -> Iterator[str]:
    """Yield what changed between two texts, ignoring case: `zero → deline`, `+ added`, `− left out`."""
    old, new = before.split(), after.split()
    matcher = difflib.SequenceMatcher(None, [w.lower() for w in old], [w.lower() for w in new], autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        left, came = " ".join(old[i:j]), " ".join(new[k:m])
        if kind != "equal":
            yield f"{left} → {came}" if left and came else f"− {left}" if left else f"+ {came}"

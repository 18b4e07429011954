"""Figures of prompts before and after a text attack, with the changed words marked."""

import difflib
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker

from rayclip.reports.figures.style import INK, MUTED, RIGHT, WRONG, choose_examples, short
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.results import Results, texts
from rayclip.reports.section import Section

_MOST = 8
Words = list[tuple[str, bool]]  # a word, and whether it was changed


def changed_prompts(results: Results, section: Section) -> list[Figure]:
    """Return a figure per model: as many prompts as fit, before and after the attack."""
    figures = []
    chosen = choose_examples(section, ("text", "multimodal"), lambda cell: bool(texts(cell)))
    for i, example in enumerate(chosen):
        rows = [(row["class"], *marked(row["clean"], row["adversarial"])) for row in texts(example.cell)[:_MOST]]
        figures.append(
            Figure(
                name=f"prompts-{i + 1}",
                title=f"Prompts for {example.subject.name} on {example.dataset} before and after "
                f"{heading(example.attack.label)}",
                caption="The changed word is marked.",
                alt=" ".join(f"{owner}: {_joined(before)} became {_joined(after)}." for owner, before, after in rows),
                draw=partial(_drawn, rows),
                html=_table(rows),
            )
        )
    return figures


def marked(before: str, after: str) -> tuple[Words, Words]:
    """Return the words of both texts with those that differ marked, ignoring case."""
    old, new = before.split(), after.split()
    matcher = difflib.SequenceMatcher(None, [w.lower() for w in old], [w.lower() for w in new], autojunk=False)
    kept_old, kept_new = set(), set()
    for block in matcher.get_matching_blocks():
        kept_old |= set(range(block.a, block.a + block.size))
        kept_new |= set(range(block.b, block.b + block.size))
    return [(w, i not in kept_old) for i, w in enumerate(old)], [(w, i not in kept_new) for i, w in enumerate(new)]


def _joined(words: Words) -> str:
    return " ".join(word for word, _ in words)


def _table(rows: Sequence[tuple[str, Words, Words]]) -> str:
    def line(words: Words) -> str:
        return " ".join(f"<mark>{escape(w)}</mark>" if changed else escape(w) for w, changed in words)

    body = "".join(
        f'<tr><th scope="row">{escape(owner)}</th><td class="text">{line(before)}</td>'
        f'<td class="text">{line(after)}</td></tr>'
        for owner, before, after in rows
    )
    heads = (
        '<th scope="col">class</th><th scope="col" class="text">prompt</th><th scope="col" class="text">attacked</th>'
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _drawn(rows: Sequence[tuple[str, Words, Words]], columns: int) -> Canvas:
    canvas = Canvas(figsize=(8.4, 0.3 + 0.27 * (len(rows) + 1)))
    columns = [
        ("class", [[(short(owner, 20), False)] for owner, _, _ in rows], INK),
        ("prompt", [before for _, before, _ in rows], RIGHT),
        ("attacked", [after for _, _, after in rows], WRONG),
    ]
    packed: list[Any] = [
        VPacker(children=[_text(name, MUTED), *(_line(words, colour) for words in lines)], pad=0, sep=7, align="left")
        for name, lines, colour in columns
    ]
    row = HPacker(children=packed, pad=0, sep=26, align="top")
    canvas.add_artist(
        AnchoredOffsetbox(
            loc="upper left",
            child=row,
            frameon=False,
            pad=0.4,
            bbox_to_anchor=(0, 1),
            bbox_transform=canvas.transFigure,
        )
    )
    return canvas


def _line(words: Words, colour: str) -> Any:
    children: list[Any] = [_text(w, colour, weight="bold") if changed else _text(w, INK) for w, changed in words]
    return HPacker(children=children, pad=0, sep=3.5, align="baseline")


def _text(text: str, colour: str, weight: str = "normal") -> TextArea:
    return TextArea(text, textprops={"color": colour, "fontsize": 9, "fontweight": weight})

"""Figures of images before and after an attack: the model's predictions, and attention maps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from rayclip.reports.document import Figure
from rayclip.reports.figures.style import INK, RIGHT, WRONG, Kept, decode, short
from rayclip.reports.numbers import Entry
from rayclip.reports.results import examples, has_examples
from rayclip.reports.table import heading

_ACROSS = 8


def grids(kept: Kept) -> list[Figure]:
    """Return a figure per model: clean images, the magnified difference, adversarial images."""
    figures = []
    chosen = kept.entries(("image", "multimodal"), lambda cell: has_examples(cell, "images"))
    for i, (subject, dataset, attack, entry) in enumerate(chosen):
        images = _rows(entry, "images")
        names = kept.results.class_names[entry.cells[0].data_fingerprint]
        broken = sum(row["clean_pred"] == row["label"] != row["adv_pred"] for row in images)
        figures.append(
            Figure(
                name=f"images-{i + 1}",
                title=f"{subject.name} on {dataset} under {heading(attack.label)}",
                caption=f"Clean images, what the attack adds (grey is nothing, black and white are the budget "
                f"{attack.eps}) and the result, each with the model's prediction; ✓ right, ✗ wrong. What is wrong "
                "before the attack is not attacked.",
                alt=f"{len(images)} images before and after the attack; {broken} that were right are wrong after it.",
                draw=partial(_sheet, images, names),
            )
        )
    return figures


def _sheet(images: Sequence[Any], names: Sequence[str]) -> Canvas:
    canvas, cells = _tiles(3, len(images))
    for j, row in enumerate(images):
        for i, kind in enumerate(("clean", "difference", "adversarial")):
            ax = cells[i][j]
            ax.imshow(decode(row[kind]))
            if kind != "difference":
                predicted = row["clean_pred" if kind == "clean" else "adv_pred"]
                right = predicted == row["label"]
                ax.set_xlabel(
                    f"{'✓' if right else '✗'} {short(names[predicted], 13)}",
                    color=RIGHT if right else WRONG,
                    fontsize=7.5,
                    labelpad=2,
                )
    for i, name in enumerate(("clean", "difference", "adversarial")):
        cells[i][0].set_ylabel(name, color=INK)
    return canvas


def attention(kept: Kept) -> list[Figure]:
    """Return a figure per model: similarity of its image patches to the true class's prompt, before and after."""
    figures = []
    chosen = kept.entries(("image", "multimodal"), lambda cell: has_examples(cell, "attention"))
    for i, (subject, dataset, attack, entry) in enumerate(chosen):
        images, rows = _rows(entry, "images"), _rows(entry, "attention")
        names = kept.results.class_names[entry.cells[0].data_fingerprint]
        moved = np.mean(
            [np.abs(decode(r["clean"]).astype(float) - decode(r["adversarial"])).mean() / 255 for r in rows]
        )
        figures.append(
            Figure(
                name=f"attention-{i + 1}",
                title=f"Where {subject.name} looks on {dataset}, before and after {heading(attack.label)}",
                caption="Cosine of each patch with the prompt of the true class, bright where it is high, scaled per "
                "image (text-guided attention of TGA-ZSR); the mean absolute change of a map, which lies in 0 to 1, "
                f"is {moved:.2f}.",
                alt=f"{len(rows)} pairs of attention maps; mean absolute change {moved:.2f}.",
                draw=partial(_maps, images, rows, names),
            )
        )
    return figures


def _maps(images: Sequence[Any], rows: Sequence[Any], names: Sequence[str]) -> Canvas:
    canvas, cells = _tiles(3, len(rows))
    for j, (image, row) in enumerate(zip(images, rows, strict=True)):
        cells[0][j].imshow(decode(image["clean"]))
        cells[0][j].set_xlabel(short(names[image["label"]], 15), color=INK, fontsize=7.5, labelpad=2)
        for i, kind in ((1, "clean"), (2, "adversarial")):
            cells[i][j].imshow(decode(row[kind]), cmap="magma", vmin=0, vmax=255, interpolation="bilinear")
    for i, name in enumerate(("image", "before", "after")):
        cells[i][0].set_ylabel(name, color=INK)
    return canvas


def _rows(entry: Entry, kind: str) -> list[Any]:
    table = examples(entry.cells[0], kind)
    return [] if table is None else table.to_pylist()[:_ACROSS]


def _tiles(down: int, across: int) -> tuple[Canvas, Any]:
    canvas = Canvas(figsize=(0.5 + 1.08 * across, 0.2 + 1.16 * down))
    cells = canvas.subplots(down, across, squeeze=False)
    for ax in cells.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    return canvas, cells

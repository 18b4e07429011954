"""Figures of images before and after an attack: the model's predictions, and attention maps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rayclip.reports.choosing import Example, choose_examples
from rayclip.reports.figures.style import INK, RIGHT, WRONG, decode, hide_axes, shorten
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.results import Results, examples, has_examples
from rayclip.reports.section import Section

_MOST = 8  # images, all side by side
_NARROW = 4  # side by side on a narrow page


def image_grids(results: Results, section: Section) -> list[Figure]:
    """Return a figure per model: clean images, the magnified difference, adversarial images."""
    figures = []
    chosen = choose_examples(section, ("image", "multimodal"), lambda cell: has_examples(cell, "images"))
    for i, example in enumerate(chosen):
        images = _kept(example, "images")
        names = results.class_names[example.cell.data_fingerprint]
        broken = sum(row["clean_pred"] == row["label"] != row["adv_pred"] for row in images)
        figures.append(
            Figure(
                name=f"images-{i + 1}",
                title=f"{example.subject.name} on {example.dataset} under {heading(example.attack.label)}",
                caption=f"Clean images, what the attack adds (grey is nothing, black and white are the budget "
                f"{example.attack.eps}) and the result, each with the model's prediction; ✓ right, ✗ wrong. What is "
                "wrong before the attack is not attacked.",
                alt=f"{len(images)} images before and after the attack; {broken} that were right are wrong after it.",
                draw=partial(_draw_images, images, names),
                narrows=len(images) > _NARROW,
            )
        )
    return figures


def _draw_images(images: Sequence[Any], names: Sequence[str], columns: int) -> Canvas:
    canvas, tiles = _tiles(len(images), columns, ("clean", "difference", "adversarial"))
    for column, row in zip(tiles, images, strict=True):
        for ax, kind in zip(column, ("clean", "difference", "adversarial"), strict=True):
            ax.imshow(decode(row[kind]))
            if kind != "difference":
                predicted = row["clean_pred" if kind == "clean" else "adv_pred"]
                right = predicted == row["label"]
                said = f"{'✓' if right else '✗'} {shorten(names[predicted], 13)}"
                ax.set_xlabel(said, color=RIGHT if right else WRONG, fontsize=7.5, labelpad=2)
    return canvas


def attention(results: Results, section: Section) -> list[Figure]:
    """Return a figure per model: similarity of its image patches to the true class's prompt, before and after."""
    figures = []
    chosen = choose_examples(section, ("image", "multimodal"), lambda cell: has_examples(cell, "attention"))
    for i, example in enumerate(chosen):
        images, maps = _kept(example, "images"), _kept(example, "attention")
        names = results.class_names[example.cell.data_fingerprint]
        changes = [np.abs(decode(r["clean"]).astype(float) - decode(r["adversarial"])).mean() / 255 for r in maps]
        moved = np.mean(changes)
        figures.append(
            Figure(
                name=f"attention-{i + 1}",
                title=f"Where {example.subject.name} looks on {example.dataset}, before and after "
                f"{heading(example.attack.label)}",
                caption="Cosine of each patch with the prompt of the true class (text-guided attention of TGA-ZSR), "
                f"scaled from 0 at an image's lowest to 1 at its highest; the mean absolute change of a map is "
                f"{moved:.2f}.",
                alt=f"{len(maps)} pairs of attention maps; mean absolute change {moved:.2f}.",
                draw=partial(_draw_maps, images, maps, names),
                narrows=len(maps) > _NARROW,
            )
        )
    return figures


def _draw_maps(images: Sequence[Any], maps: Sequence[Any], names: Sequence[str], columns: int) -> Canvas:
    canvas, tiles = _tiles(len(maps), columns, ("image", "before", "after"))
    for column, image, row in zip(tiles, images, maps, strict=True):
        column[0].imshow(decode(image["clean"]))
        column[0].set_xlabel(shorten(names[image["label"]], 15), color=INK, fontsize=7.5, labelpad=2)
        for ax, kind in ((column[1], "clean"), (column[2], "adversarial")):
            shown = ax.imshow(decode(row[kind]), cmap="magma", vmin=0, vmax=255, interpolation="bilinear")
    scale = canvas.colorbar(shown, ax=canvas.axes, location="bottom", shrink=0.4, aspect=30, pad=0.02)
    scale.set_ticks([0, 127.5, 255], labels=["0 lowest of the image", "0.5", "1 highest"], fontsize=7.5)
    scale.outline.set_visible(False)
    return canvas


def _kept(example: Example, kind: str) -> list[Any]:
    return examples(example.cell, kind).to_pylist()[:_MOST]


def _tiles(count: int, columns: int, names: Sequence[str]) -> tuple[Canvas, list[list[Axes]]]:
    """Return a canvas, and for each image its axes below one another, named at the left."""
    across = min(count, _MOST if columns > 1 else _NARROW)
    blocks = -(-count // across)
    canvas = Canvas(figsize=(0.5 + 1.08 * across, 0.2 + 1.16 * len(names) * blocks))
    cells = canvas.subplots(len(names) * blocks, across, squeeze=False)
    for ax in cells.flat:
        hide_axes(ax)
    found = []
    for i in range(count):
        block, column = divmod(i, across)
        found.append([cells[block * len(names) + row][column] for row in range(len(names))])
        if column == 0:
            for ax, name in zip(found[-1], names, strict=True):
                ax.set_ylabel(name, color=INK)
    return canvas, found

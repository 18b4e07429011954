"""Contact sheets: overview images of a data set's samples with their classes or captions."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rayclip.data.images import ImageSet
from rayclip.data.opening import open_either
from rayclip.data.parquet import PairSet

_COLUMNS, _ROWS = 8, 6
_SIDE, _PAD, _TEXT = 112, 8, 18
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def contact_sheet(place: str, split: str | None = None) -> bytes:
    """Draw up to 48 images of a data set as PNG bytes, spread evenly over the classes and the data; `split` is None for
    the evaluated one. Raises `UserError` if there is no such data set or split."""
    data = open_either(place, split)
    texts: Sequence[str]
    if isinstance(data, PairSet):
        chosen = _evenly(np.arange(len(data)), _COLUMNS * _ROWS)
        texts = [data.captions[p][0] for p in chosen]
    else:
        chosen = _spread(data, _COLUMNS * _ROWS)
        texts = [data.class_names[label] for label in data.labels[chosen]]
    rows = -(-len(chosen) // _COLUMNS)
    cell = _SIDE + _PAD, _SIDE + _TEXT + _PAD
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _PAD, rows * cell[1] + _TEXT + 2 * _PAD), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((_PAD, _PAD), f"{data.name}: {len(chosen)} of {len(data):,} images", _INK, ImageFont.load_default(15))
    for i, (image, text) in enumerate(zip(data.images(chosen.tolist()), texts, strict=True)):
        left, top = _PAD + i % _COLUMNS * cell[0], _TEXT + 2 * _PAD + i // _COLUMNS * cell[1]
        scale = _SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        sheet.paste(image.resize(size, how), (left + (_SIDE - size[0]) // 2, top + (_SIDE - size[1]) // 2))
        draw.text((left, top + _SIDE + 1), _fit(draw, font, text), _INK, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()


def _evenly(positions: np.ndarray, count: int) -> np.ndarray:
    """Choose up to `count` of the positions, evenly spread."""
    return positions[np.linspace(0, len(positions) - 1, min(len(positions), count)).round().astype(int)]


def _spread(data: ImageSet, count: int) -> np.ndarray:
    """Choose positions that cover as many classes as possible, spread over the data of each class."""
    per_class = -(-count // len(data.class_names))
    members = [np.flatnonzero(data.labels == label) for label in range(len(data.class_names))]
    return _evenly(np.concatenate([_evenly(found, per_class) for found in members]), count)


def _fit(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> str:
    if draw.textlength(text, font) <= _SIDE:
        return text
    while text and draw.textlength(text + "…", font) > _SIDE:
        text = text[:-1]
    return text + "…"

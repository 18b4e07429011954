"""Draw an attack's examples: clean images, the magnified perturbation and adversarial images, with predictions (x if
wrong)."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SIDE, _PAD, _TEXT, _LEFT = 112, 8, 18, 96
_INK, _GOOD, _BAD, _PAPER = (32, 32, 32), (20, 110, 60), (180, 30, 40), (255, 255, 255)


def example_grid(examples: Any, class_names: Sequence[str], title: str) -> bytes:
    """Return a PNG of up to eight images in three rows: clean, difference, adversarial.

    `examples` is an Arrow table with `label, clean_pred, adv_pred` and PNG bytes in `clean, difference, adversarial`.
    """
    rows = examples.to_pylist()
    width = _LEFT + len(rows) * (_SIDE + _PAD) + _PAD
    height = 2 * _TEXT + 2 * _PAD + 3 * (_SIDE + _TEXT + _PAD)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_PAD, _PAD), title, _INK, ImageFont.load_default(15))
    for i, name in enumerate(("clean", "difference", "adversarial")):
        top = 2 * _TEXT + i * (_SIDE + _TEXT + _PAD)
        draw.text((_PAD, top + _SIDE / 2 - 7), name, _INK, font)
        for j, row in enumerate(rows):
            left = _LEFT + j * (_SIDE + _PAD)
            image = Image.open(io.BytesIO(row[name])).convert("RGB")
            sheet.paste(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top))
            if name != "difference":
                predicted = row["clean_pred" if name == "clean" else "adv_pred"]
                right = predicted == row["label"]
                called = class_names[predicted]
                shown = called if len(called) <= 16 else called[:14] + ".."  # the font has no ellipsis
                said = f"{'' if right else 'x '}{shown}"
                draw.text((left, top + _SIDE + 1), said, _GOOD if right else _BAD, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()

"""Decode image files to RGB, or say why an image cannot be used. Preparing and reading share these rules."""

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TypeVar

import numpy as np
from PIL import Image

# The formats found in data sets. Pillow knows more, some of which start other programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Modes kept as they are: all common readers decode them alike.
_KEPT_MODES = ("RGB", "L")
_KINDS = {"I": "16-bit", "P": "palette", "1": "1-bit"}  # of other modes
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
_PIXELS = 61_000_000  # of the largest image, as cameras make them; decoding takes up to 0.9 GB (WebP with alpha)
_ROWS = 256
_WINDOW = 8  # items in flight per thread

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BadImageError(Exception):
    """Error for an image that cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """A usable image.

    Attributes:
        data: the original file, or a PNG of its RGB pixels where readers would disagree about the original.
        converted: kind of the original if it was converted ("CMYK", "16-bit", "animated"); None if it is kept.
        size: (width, height) in pixels.
    """

    data: bytes
    converted: str | None
    size: tuple[int, int]


def check_image(data: bytes) -> CheckedImage:
    """Check an image file by decoding it completely; keep its bytes where possible. Raises `BadImageError`: empty, not
    an image, truncated, damaged, or pixels of unknown range."""
    with _opened(data) as image:
        what = None if image.mode in _KEPT_MODES else _KINDS.get(image.mode.partition(";")[0], image.mode)
        if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
            what = "animated"
        if image.format == "PNG":  # decoding alone does not verify every checksum
            with _opened(data) as again:
                again.verify()
        rgb = to_rgb(image)
        if what is None:
            return CheckedImage(data=data, converted=None, size=rgb.size)
        buffer = io.BytesIO()
        rgb.save(buffer, "PNG")
    return CheckedImage(data=buffer.getvalue(), converted=what, size=rgb.size)


def decode(data: bytes | memoryview) -> Image.Image:
    """Decode a file's bytes to an RGB image: the first frame, without transparency, EXIF rotation not applied. Raises
    `BadImageError`: see `check_image`."""
    with _opened(data) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and convert it to RGB. 16-bit grey is scaled; Pillow's own conversion would clip it at 255."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        scaled = np.empty((image.height, image.width), np.uint8)
        for top in range(0, image.height, _ROWS):  # a few rows at a time: large images have hundreds of MB
            rows = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
            grey = np.asarray(rows).astype(np.int64)
            if grey.min() < 0 or grey.max() > 65535:
                raise BadImageError("32-bit pixels of unknown range")
            scaled[top : top + _ROWS] = np.round(grey / 257)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode == "F":
        raise BadImageError("floating-point pixels of unknown range")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparent colours
    return image.convert("RGB")


@contextmanager
def _opened(data: bytes | memoryview) -> Iterator[Image.Image]:
    """Open an image; any error while it is open becomes a `BadImageError` with the reason."""
    if not data:
        raise BadImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > _PIXELS:
                raise BadImageError(f"{image.width}×{image.height} pixels, more than {_PIXELS:,}")
            yield image
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("no image file") from None
    except Exception as error:  # decoders raise all kinds of errors on invalid bytes, not only in `load`
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "truncated" if "truncated" in text.lower() else "damaged"
        raise BadImageError(f"{what} ({text})") from error


@cache
def _formats() -> tuple[str, ...]:
    """Load Pillow's plugins and return those of `FORMATS` that this Pillow was built with."""
    # Pillow warns of odd metadata and of very large images; here only exceptions mark an image as unusable.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def in_order(
    items: Iterable[_Item], work: Callable[[_Item], _Result], jobs: int | None = None
) -> Generator[tuple[_Item, _Result], None, None]:
    """Yield each item with the result of `work` on it, in order, computed on `jobs` threads (default: one per core).

    Only a few items are in flight, so that memory stays bounded. Threads suffice because Pillow decodes without
    Python's global lock.
    """
    jobs = jobs or os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:
        submitted = ((item, pool.submit(work, item)) for item in items)
        flying: deque[tuple[_Item, Future[_Result]]] = deque(islice(submitted, jobs * _WINDOW))
        try:
            while flying:
                item, future = flying.popleft()
                yield item, future.result()
                flying.extend(islice(submitted, 1))
        finally:
            for _, future in flying:
                future.cancel()

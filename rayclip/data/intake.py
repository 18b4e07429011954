"""From an image file's bytes to RGB, or the reason why not. Preparing and reading share these rules."""

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image

# What data sets are made of. Pillow knows more formats, some of which start other programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Left as they are: every reader of the field shows these alike.
_KEPT_MODES = ("RGB", "L")
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
_WINDOW = 8  # items in flight a thread

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A usable image.

    Attributes:
        data: the original file, or a PNG of its RGB pixels where readers would disagree about the original.
        converted: what the original was ("CMYK", "16-bit", "animated"); None where it is kept.
        size: (width, height) in pixels.
    """

    data: bytes
    converted: str | None
    size: tuple[int, int]


def take_in(data: bytes) -> Taken:
    """Check a file by decoding all of it; keep its bytes where possible.

    Raises:
        BadImageError: empty, no image, truncated, damaged, or of unknown range.
    """
    with _opened(data) as image:
        what = _unusual(image)
        if image.format == "PNG":  # decoding alone does not look at every checksum
            with _opened(data) as again:
                again.verify()
        rgb = to_rgb(image)
        if what is None:
            return Taken(data=data, converted=None, size=rgb.size)
        buffer = io.BytesIO()
        rgb.save(buffer, "PNG")
    return Taken(data=buffer.getvalue(), converted=what, size=rgb.size)


def decode(data: bytes | memoryview) -> Image.Image:
    """The RGB image in a file's bytes: the first frame, without transparency, EXIF rotation not applied.

    Raises:
        BadImageError: as `take_in`.
    """
    with _opened(data) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert. 16-bit grey is scaled, where Pillow's own conversion would cut it off at 255."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImageError("32-bit pixels of unknown range")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("floating-point pixels of unknown range")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparent colours
    return image.convert("RGB")


@contextmanager
def _opened(data: bytes | memoryview) -> Iterator[Image.Image]:
    """Whatever goes wrong while an image is open is the reason why it cannot be used."""
    if not data:
        raise BadImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            yield image
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("no image file") from None
    except Exception as error:  # decoders raise anything on foreign bytes, and not in `load` alone
        raise BadImageError(_reason(error)) from error


def _unusual(image: Image.Image) -> str | None:
    if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
        return "animated"
    if image.mode in _KEPT_MODES:
        return None
    return "16-bit" if image.mode.startswith("I") else {"P": "palette", "1": "1-bit"}.get(image.mode, image.mode)


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"truncated ({text})" if "truncated" in text.lower() else f"damaged ({text})"


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with, once its plugins are loaded."""
    # Pillow warns of odd metadata and of very large images; what cannot be used is said by exceptions alone.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def in_order(
    items: Iterable[_Item], work: Callable[[_Item], _Result], jobs: int | None = None
) -> Generator[tuple[_Item, _Result], None, None]:
    """`work` of each item on `jobs` threads (by default one a core), in the items' order.

    Only a few items are in flight, so that memory stays bounded. Pillow decodes without Python's lock.
    """
    jobs = jobs or os.cpu_count() or 1
    flying: deque[tuple[_Item, Future[_Result]]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for item in items:
                flying.append((item, pool.submit(work, item)))
                if len(flying) >= jobs * _WINDOW:
                    head, future = flying.popleft()
                    yield head, future.result()
            while flying:
                head, future = flying.popleft()
                yield head, future.result()
        finally:
            for _, future in flying:
                future.cancel()

"""A source of numbered pictures, and a program that prepares it and can be killed at that.

python -m data.pictures ROOT DELAY
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from rayclip.data.manifest import Manifest
from rayclip.data.prepare import Layout, Request, prepare
from rayclip.data.sources import Record, Source
from rayclip.store import Store

NAMES = ("cat", "dog", "lemon")
SIZES = {"train": 40, "test": 24}
SMALL = Layout(shard=4000, group=1500)  # some five pictures a shard, two a row group


def picture(number: int) -> bytes:
    """A PNG of noise, some 900 bytes."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "png")
    return buffer.getvalue()


class Pictures(Source):
    """Pictures of three classes in turn, or with captions.

    Args:
        sizes: of the splits.
        first: number of the first picture; another number makes another source.
        bad: records whose file is no image, as (split, number).
        labelled: False for captions.
        on_read: called with split and number before a picture is read.
    """

    def __init__(
        self,
        sizes: dict[str, int] = SIZES,
        first: int = 0,
        bad: tuple[tuple[str, int], ...] = (),
        labelled: bool = True,
        on_read: Callable[[str, int], None] = lambda split, number: None,
    ) -> None:
        self.class_names = NAMES if labelled else ()
        self._sizes, self._first, self._bad, self._on_read = sizes, first, bad, on_read

    def describe(self) -> dict[str, Any]:
        return {"kind": "pictures", "first": self._first}

    def splits(self) -> dict[str, int | None]:
        return dict(self._sizes)

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        for number in range(start, self._sizes[split]):
            target = {"label": number % 3} if self.class_names else {"captions": (f"{split} {number}", "again")}
            yield Record(path=f"{split}/{number}.png", read=self._reader(split, number), **target)

    def _reader(self, split: str, number: int) -> Callable[[], bytes]:
        def read() -> bytes:
            self._on_read(split, number)
            seed = self._first + number + 1000 * (split == "train")
            return b"no image" if (split, number) in self._bad else picture(seed)

        return read


def run(root: str, source: Source, **changes: Any) -> Manifest:
    """Prepare `source` below `root` in small shards."""
    request = {"name": "pictures", "class_names": source.class_names, "splits": tuple(source.splits()), "jobs": 2}
    return prepare(Request(**{**request, "layout": SMALL, **changes}), source, Store(str(root)))


if __name__ == "__main__":
    run(sys.argv[1], Pictures(on_read=lambda split, number: time.sleep(float(sys.argv[2]))))

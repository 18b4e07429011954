"""Read the images of a prepared data set directly from its memory-mapped Parquet files.

`prepare` writes image bytes uncompressed and records the offset of each image in the file, so that random access reads
only the image's own bytes, not its row group. Every read is verified against the image's checksum.
"""

import bisect
import itertools
import mmap
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rayclip.types import UserError

# One image: offset and size of its bytes in its Parquet file, their CRC-32, and its label (-1 for captions).
INDEX = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("label", "<i8")])


class MappedImages:
    """The encoded images of several Parquet files as one sequence; see `TableImages`. Processes of one node share the
    mapped pages.

    Args:
        rows: number of rows of each file.
        locate: returns the local path of file number i.
        index: `(N,)` of `INDEX`, the images of all files in order.
    """

    def __init__(self, rows: Sequence[int], locate: Callable[[int], Path], index: np.ndarray, name: str) -> None:
        self._starts = [0, *itertools.accumulate(rows)]
        self._locate, self._index, self._name = locate, index, name
        self._maps: dict[int, memoryview] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> memoryview:
        """Return an image's encoded bytes. Raises `UserError` if they do not match their checksum."""
        number = bisect.bisect_right(self._starts, position) - 1
        if number not in self._maps:
            with self._locate(number).open("rb") as file:
                self._maps[number] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        offset, size, crc, _ = self._index[position].item()
        data = self._maps[number][offset : offset + size]
        if zlib.crc32(data) != crc:
            raise UserError(
                f"image {position} of '{self._name}' is damaged on disk: `rayclip data verify {self._name}` tells "
                "more; prepare it again as before, with --force."
            )
        return data


def index_of(path: Path, labels: Sequence[int] | None) -> np.ndarray:
    """Build the index of a Parquet file's images, written without compression and dictionaries. `labels` is None for
    captions."""
    file = pq.ParquetFile(path)
    index = np.zeros(file.metadata.num_rows, INDEX)
    index["label"] = -1 if labels is None else labels
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        row = at = 0
        for group in range(file.num_row_groups):
            column = file.read_row_group(group, columns=["image.bytes"])["image"]
            for image in column.to_pylist():
                data = image["bytes"]
                at = mapped.find(data, at)
                if at < 0:
                    raise ValueError(f"the bytes of row {row} are not in {path}")
                index[row] = at, len(data), zlib.crc32(data), index[row]["label"]
                at += len(data)
                row += 1
            mapped.madvise(mmap.MADV_DONTNEED)  # otherwise the whole file would count as this process's memory
    return index

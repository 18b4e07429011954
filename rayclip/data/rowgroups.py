"""Random access to the encoded images of Parquet or Arrow files, read one memory-mapped row group at a time."""

import bisect
import io
import itertools
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.arrowfile import ARROW, ArrowFile, fingerprint_bytes
from rayclip.data.columns import is_image, is_text
from rayclip.data.intake import BadImageError
from rayclip.types import UserError

# Errors that Arrow raises for damaged files: invalid UTF-8 is a ValueError, unusual types are "not implemented".
UNREADABLE = (pa.ArrowException, OSError, ValueError)
_CACHE_BYTES = 512 << 20  # encoded images kept in memory per data set and process
_NOTHING = memoryview(b"")
_LFS = b"version https://git-lfs"


class RowGroups:
    """The image column of several Parquet files as one sequence of encoded images.

    Files are opened when one of their rows is first read, so that a node fetches only what it reads. Picklable,
    without open files and cached rows. Not thread-safe.

    Args:
        rows: number of rows of each file.
        locate: returns the local path of file number i.
        column: the column of images: `struct<bytes, path>` or plain binary; or, as a struct without bytes or as text,
            paths of image files, relative to the file that names them.
        name: name of the data set, for messages.
    """

    def __init__(self, rows: Sequence[int], locate: Callable[[int], Path], column: str, name: str) -> None:
        self._starts = [0, *itertools.accumulate(rows)]
        self._locate, self._column, self._name = locate, column, name
        self._forget()

    def _forget(self) -> None:
        self._files: dict[int, tuple[Any, list[int]]] = {}
        self._cache: OrderedDict[tuple[int, int], list[memoryview | str]] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_cache": OrderedDict(), "_cached_bytes": 0}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> memoryview:
        """Return the encoded image in a row; empty if the row has none.

        Raises:
            UserError: the Parquet file is damaged.
            BadImageError: the row names an image file that cannot be read.
        """
        number = bisect.bisect_right(self._starts, position) - 1
        row = position - self._starts[number]
        _, starts = self._file(number)
        group = bisect.bisect_right(starts, row) - 1
        found = self._rows(number, group)[row - starts[group]]
        if isinstance(found, memoryview):
            return found
        path = beside(self._locate(number), found)
        try:
            return memoryview(path.read_bytes())
        except OSError as error:
            raise BadImageError(f"no image in the row, and no file {path}") from error

    def paths(self) -> list[Path]:
        """Return the image files that rows name instead of holding bytes. Reads only row groups in which, by their
        statistics, bytes are missing."""
        found: list[Path] = []
        for number in range(len(self._starts) - 1):
            file, starts = self._file(number)
            for group in range(len(starts) - 1):
                if starts[group + 1] > starts[group] and _lacks_bytes(file, group, self._column):
                    named = (row for row in self._rows(number, group) if isinstance(row, str))
                    found += [beside(self._locate(number), path) for path in named]
        return found

    def _file(self, number: int) -> tuple[Any, list[int]]:
        if number not in self._files:
            file = open_parquet(self._locate(number))
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            self._files[number] = file, [0, *itertools.accumulate(sizes)]
            if self._files[number][1][-1] != self._starts[number + 1] - self._starts[number]:
                raise UserError(f"file {number} of '{self._name}' has another number of rows than its manifest says.")
            if not _holds_files(file.schema_arrow, self._column):
                raise UserError(
                    f"file {number} of '{self._name}' has no column '{self._column}' of encoded images: write it as "
                    "struct<bytes, path>, or prepare it again."
                )
        return self._files[number]

    def _rows(self, number: int, group: int) -> list[memoryview | str]:
        key = number, group
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        file, starts = self._file(number)
        try:
            # Threads of Arrow's pool do not survive the fork of a DataLoader worker.
            table = file.read_row_group(group, columns=[self._column], use_threads=False)
            rows = [view for chunk in table[self._column].chunks for view in _views(chunk)]
            if len(rows) != starts[group + 1] - starts[group]:
                raise ValueError(f"{len(rows)} rows")
        except (*UNREADABLE, KeyError) as error:
            raise UserError(
                f"row group {group} in file {number} of '{self._name}' is damaged ({first_line(error)}): "
                "fetch or prepare it again."
            ) from error
        self._cache[key] = rows
        self._cached_bytes += sum(map(len, rows))
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= sum(map(len, dropped))
        return rows


def beside(file: Path, path: str) -> Path:
    """Return the path of an image file that a row names, relative to the folder of the data file."""
    return file.parent / path


def checksums(paths: Sequence[Path]) -> list[int]:
    """Return the CRC-32 of each file; -1 for a missing file."""
    return [zlib.crc32(path.read_bytes()) if path.is_file() else -1 for path in paths]


def _holds_files(schema: Any, column: str) -> bool:
    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    return is_image(kind) or is_text(kind)


def _lacks_bytes(file: Any, group: int, column: str) -> bool:
    """Return whether some rows of a row group hold no image bytes; without statistics, the first row decides."""
    kind = file.schema_arrow.field(column).type
    if is_text(kind):
        return True
    if not pa.types.is_struct(kind):
        return False
    if kind.get_field_index("bytes") < 0 or pa.types.is_null(kind.field("bytes").type):
        return True
    if isinstance(file, ArrowFile):
        chunks = file.read_row_group(group, [column])[column].chunks
        return any(chunk.field("bytes").null_count for chunk in chunks)
    statistics = _statistics(file, group, f"{column}.bytes")
    if statistics is not None and statistics.has_null_count:
        return bool(statistics.null_count)
    first = next(file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False), None)
    return first is not None and first.column(0).field("bytes").null_count > 0


def _statistics(file: Any, group: int, leaf: str) -> Any:
    about = file.metadata.row_group(group)
    columns = (about.column(i) for i in range(about.num_columns))
    return next((c.statistics for c in columns if c.path_in_schema == leaf and c.is_stats_set), None)


def _views(chunk: Any) -> list[memoryview | str]:
    """Return each image's bytes without a copy, or the path that a row has instead."""
    if is_text(chunk.type):
        return [path if path else _NOTHING for path in chunk.to_pylist()]
    if not pa.types.is_struct(chunk.type):
        return list(_bytes_of(chunk))
    found: list[memoryview | str] = [_NOTHING] * len(chunk)
    valid = chunk.is_valid().to_pylist() if chunk.null_count else [True] * len(chunk)
    names = [chunk.type.field(i).name for i in range(chunk.type.num_fields)]
    if "bytes" in names and not pa.types.is_null(chunk.type.field("bytes").type):
        # `field`, unlike `flatten`, keeps the rows of nulls.
        found = [view if ok else _NOTHING for view, ok in zip(_bytes_of(chunk.field("bytes")), valid, strict=True)]
    empty = [i for i, view in enumerate(found) if not view and valid[i]]
    if empty and "path" in names and is_text(chunk.type.field("path").type):
        lacking = chunk.field("bytes").is_null().to_pylist() if "bytes" in names else [True] * len(chunk)
        paths = chunk.field("path")
        for i in empty:
            if lacking[i] and (path := paths[i].as_py()):  # empty bytes are a damaged image, not a missing one
                found[i] = path
    return found


def _bytes_of(chunk: Any) -> list[memoryview]:
    if len(chunk) == 0:
        return []
    if pa.types.is_binary_view(chunk.type):
        chunk = chunk.cast(pa.large_binary())
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    wide = pa.types.is_large_binary(chunk.type)
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    whole = memoryview(data if data is not None else b"")
    bounds = zip(ends[:-1].tolist(), ends[1:].tolist(), valid.tolist(), strict=True)
    return [whole[a:b] if ok else _NOTHING for a, b, ok in bounds]


def open_parquet(path: Path) -> Any:
    """Open a file as a memory-mapped `ParquetFile` that verifies page checksums, or as an `ArrowFile`, which has the
    same reading methods.

    Raises:
        UserError: the file is missing or neither Parquet nor Arrow.
    """
    if not path.is_file():
        raise UserError(f"no such data file: {path}.")
    try:
        if is_arrow(path):
            return ArrowFile(path)
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except UNREADABLE as error:
        reason = lfs_pointer(path) or first_line(error)
        raise UserError(f"{path} is no readable Parquet file: {reason}") from error


def lfs_pointer(path: Path) -> str | None:
    """Return what to do about a Git LFS pointer left in a file's place; None if the file is not a pointer."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    return "it only says where Git LFS has it, run `git lfs pull` in its folder." if is_pointer else None


def read_column(path: Path, file: Any, column: str) -> Any:
    """Read and validate a whole column.

    Raises:
        UserError: the column is damaged.
    """
    try:
        values = file.read(columns=[column])[column]
        values.validate(full=True)
        if len(values) != file.metadata.num_rows:
            raise ValueError(f"{len(values)} of {file.metadata.num_rows} rows")
    except (*UNREADABLE, KeyError) as error:
        raise UserError(f"{path} is damaged in its column '{column}' ({first_line(error)}): fetch it again.") from error
    return values


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def is_arrow(path: Path) -> bool:
    """Return whether a file begins like an Arrow stream or file."""
    with path.open("rb") as file:
        return file.read(4) in ARROW


def footer(path: Path) -> bytes:
    """Return a Parquet file's footer: row counts, offsets, sizes and statistics, which change with the content. For an
    Arrow file, which has no footer, return `fingerprint_bytes`."""
    if is_arrow(path):
        return fingerprint_bytes(path)
    with path.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        length = int.from_bytes(file.read(4), "little") + 8
        file.seek(-length, io.SEEK_END)
        return file.read()

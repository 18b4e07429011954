"""Encoded images out of Parquet files: any row at any time, a memory-mapped row group at a time."""

import bisect
import io
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.types import UserError

# What Arrow raises for damaged files: bytes that are no UTF-8 are a ValueError, odd types are "not implemented".
UNREADABLE = (pa.ArrowException, OSError, ValueError)
_CACHE_BYTES = 512 << 20  # encoded images kept in memory per data set and process


class RowGroups:
    """The image column of several Parquet files as one sequence of encoded images.

    Files are opened when a row of theirs is asked for, so that a node fetches only what it reads. Picklable: open
    files and cached rows stay behind. Not for several threads at once.

    Args:
        rows: of each file.
        locate: the local path of file number i.
        column: holds `struct<bytes, path>` or plain binary.
        name: of the data set, for messages.
    """

    def __init__(self, rows: Sequence[int], locate: Callable[[int], Path], column: str, name: str) -> None:
        self._starts = [0, *itertools.accumulate(rows)]
        self._locate, self._column, self._name = locate, column, name
        self._forget()

    def _forget(self) -> None:
        self._files: dict[int, tuple[Any, list[int]]] = {}
        self._cache: OrderedDict[tuple[int, int], list[memoryview]] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_cache": OrderedDict(), "_cached_bytes": 0}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> memoryview:
        """The file's bytes; empty where there are none.

        Raises:
            UserError: the Parquet file is damaged.
        """
        number = bisect.bisect_right(self._starts, position) - 1
        row = position - self._starts[number]
        _, starts = self._file(number)
        group = bisect.bisect_right(starts, row) - 1
        return self._rows(number, group)[row - starts[group]]

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

    def _rows(self, number: int, group: int) -> list[memoryview]:
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


def _holds_files(schema: Any, column: str) -> bool:
    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    return kind in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string())


def _views(chunk: Any) -> list[memoryview]:
    """Each image's bytes without a copy."""
    if pa.types.is_struct(chunk.type):
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        chunk = chunk.field("bytes")  # unlike `flatten`, keeps the rows of nulls
    else:
        valid = np.ones(len(chunk), dtype=bool)
    if len(chunk) == 0:
        return []
    wide = pa.types.is_large_binary(chunk.type) or pa.types.is_large_string(chunk.type)
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    valid &= chunk.is_valid().to_numpy(zero_copy_only=False)
    whole = memoryview(data if data is not None else b"")
    bounds = zip(ends[:-1].tolist(), ends[1:].tolist(), valid.tolist(), strict=True)
    return [whole[a:b] if ok else whole[:0] for a, b, ok in bounds]


def open_parquet(path: Path) -> Any:
    """A memory-mapped `ParquetFile`, whose page checksums are looked at.

    Raises:
        UserError: missing, or no Parquet.
    """
    if not path.is_file():
        raise UserError(f"no such data file: {path}.")
    try:
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except UNREADABLE as error:
        raise UserError(f"{path} is no readable Parquet file: {first_line(error)}") from error


def read_column(path: Path, file: Any, column: str) -> Any:
    """A whole column, checked.

    Raises:
        UserError: it is damaged.
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


def footer(path: Path) -> bytes:
    """A Parquet file's footer: row counts, offsets, sizes and statistics, which change with what is in the file."""
    with path.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        length = int.from_bytes(file.read(4), "little") + 8
        file.seek(-length, io.SEEK_END)
        return file.read()

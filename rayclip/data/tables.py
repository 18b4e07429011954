"""Parquet and Arrow files: opening them, reading a column, and random access to their encoded images.

Arrow files, as `datasets.Dataset.save_to_disk` writes them, are given the methods of `ParquetFile` that are used here.
"""

import bisect
import hashlib
import io
import itertools
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayclip.data.columns import is_text
from rayclip.data.intake import BadImageError
from rayclip.types import UserError

# Errors that Arrow raises for damaged files: invalid UTF-8 is a ValueError, unusual types are "not implemented".
UNREADABLE = (pa.ArrowException, OSError, ValueError)
_CACHE_BYTES = 512 << 20  # encoded images kept in memory per data set and process
_LFS = b"version https://git-lfs"
_ARROW = (b"\xff\xff\xff\xff", b"ARRO")  # first bytes of a stream, and of a file
_EDGE = 1 << 20

_T = TypeVar("_T")


class TableImages:
    """The image column of several files as one sequence of encoded images, read one row group at a time.

    Files are opened when one of their rows is first read, so that a node fetches only what it reads. Picklable, without
    open files and cached rows. Not thread-safe.

    Args:
        rows: number of rows of each file.
        locate: returns the local path of file number i.
        column: holds `struct<bytes, path>`, binary, or paths relative to the file that names them.
    """

    def __init__(self, rows: Sequence[int], locate: Callable[[int], Path], column: str, name: str) -> None:
        self._starts = [0, *itertools.accumulate(rows)]
        self._locate, self._column, self._name = locate, column, name
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_starts", "_locate", "_column", "_name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files: dict[int, tuple[Any, list[int]]] = {}
        self._cache: OrderedDict[tuple[int, int], list[bytes | str]] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> bytes:
        """Return the encoded image in a row; empty if the row has none. Raises `UserError` if the table is damaged,
        `BadImageError` if the row names an image file that cannot be read."""
        number = bisect.bisect_right(self._starts, position) - 1
        row = position - self._starts[number]
        _, starts = self._file(number)
        group = bisect.bisect_right(starts, row) - 1
        found = self._rows(number, group)[row - starts[group]]
        if isinstance(found, bytes):
            return found
        path = self._locate(number).parent / found
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadImageError(f"no image in the row, and no file {path}") from error

    def paths(self) -> list[Path]:
        """Return the image files that rows name instead of holding bytes."""
        found: list[Path] = []
        for number in range(len(self._starts) - 1):
            _, starts = self._file(number)
            for group in range(len(starts) - 1):
                if starts[group + 1] > starts[group] and self._lacks_bytes(number, group):
                    named = (row for row in self._rows(number, group) if isinstance(row, str))
                    found += [self._locate(number).parent / path for path in named]
        return found

    def _lacks_bytes(self, number: int, group: int) -> bool:
        """Return whether some rows of a row group hold no image bytes."""
        file, _ = self._file(number)
        kind = file.schema_arrow.field(self._column).type
        if not pa.types.is_struct(kind):
            return is_text(kind)
        if kind.get_field_index("bytes") < 0 or pa.types.is_null(kind.field("bytes").type):
            return True
        if not isinstance(file, ArrowFile):
            about = file.metadata.row_group(group)
            for leaf in (about.column(i) for i in range(about.num_columns)):
                counted = leaf.is_stats_set and leaf.statistics.has_null_count
                if leaf.path_in_schema == f"{self._column}.bytes" and counted:
                    return bool(leaf.statistics.null_count)
        return any(self._convert(number, group, lambda chunk: chunk.field("bytes").null_count > 0))

    def _file(self, number: int) -> tuple[Any, list[int]]:
        """Return a file and the first row of each of its row groups, and the number of rows."""
        if number not in self._files:
            file = open_table(self._locate(number))
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            self._files[number] = file, [0, *itertools.accumulate(sizes)]
            if sum(sizes) != self._starts[number + 1] - self._starts[number]:
                raise UserError(f"file {number} of '{self._name}' has changed since it was opened: run again.")
        return self._files[number]

    def _rows(self, number: int, group: int) -> list[bytes | str]:
        key = number, group
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        rows = list(itertools.chain(*self._convert(number, group, lambda chunk: [encoded_image(row) for row in chunk])))
        self._cache[key] = rows
        self._cached_bytes += sum(map(len, rows))
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= sum(map(len, dropped))
        return rows

    def _convert(self, number: int, group: int, convert: Callable[[Any], _T]) -> list[_T]:
        """Return what `convert` makes of each chunk of a row group."""
        file, starts = self._file(number)
        try:
            # Threads of Arrow's pool do not survive the fork of a DataLoader worker.
            column = file.read_row_group(group, columns=[self._column], use_threads=False)[self._column]
            if len(column) != starts[group + 1] - starts[group]:
                raise ValueError(f"{len(column)} rows")
            return [convert(chunk) for chunk in column.chunks]
        except (*UNREADABLE, KeyError) as error:
            raise UserError(
                f"row group {group} in file {number} of '{self._name}' is damaged ({first_line(error)}): "
                "fetch or prepare it again."
            ) from error


class ArrowFile:
    """A memory-mapped Arrow stream or file. Its record batches take the place of Parquet's row groups. Raises
    `pyarrow.ArrowException, OSError`: the file is damaged."""

    def __init__(self, path: Path) -> None:
        source = pa.memory_map(str(path))
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self._batches = list(reader)
        for column in itertools.chain.from_iterable(batch.columns for batch in self._batches):
            # Arrow believes the file: offsets that point beyond it would read other memory, or end the process
            kind = _as_bytes(column.type)
            (column if kind == column.type else column.view(kind)).validate(full=True)
        self.schema_arrow = reader.schema
        self.num_row_groups = len(self._batches)
        rows = [SimpleNamespace(num_rows=batch.num_rows) for batch in self._batches]
        self.metadata = SimpleNamespace(num_rows=sum(r.num_rows for r in rows), row_group=rows.__getitem__)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return pa.Table.from_batches(self._batches, self.schema_arrow).select(list(columns))

    def read_row_group(self, group: int, columns: Sequence[str], use_threads: bool = True) -> pa.Table:
        return pa.Table.from_batches([self._batches[group]]).select(list(columns))

    def iter_batches(
        self, size: int, row_groups: Sequence[int], columns: Sequence[str], use_threads: bool = True
    ) -> Iterator[pa.RecordBatch]:
        for group in row_groups:
            batch = self._batches[group].select(list(columns))
            for start in range(0, batch.num_rows, size):
                yield batch.slice(start, size)

    def close(self) -> None:
        self._batches = []


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return a type with bytes in place of texts, whose encoding is each row's own affair."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.large_list if pa.types.is_large_list(kind) else pa.list_
        return make(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def checksums(paths: Sequence[Path]) -> list[int]:
    """Return the CRC-32 of each file; -1 for a missing file."""
    return [zlib.crc32(path.read_bytes()) if path.is_file() else -1 for path in paths]


def encoded_image(scalar: Any) -> bytes | str:
    """Return a row's encoded image, or the path that it has instead; empty for neither."""
    if isinstance(scalar, pa.StructScalar):
        data = scalar["bytes"].as_py() if scalar.is_valid and "bytes" in scalar else None
        if data is not None or not scalar.is_valid or "path" not in scalar:
            return data or b""  # empty bytes are a damaged image, not a missing one
        scalar = scalar["path"]
    try:
        found = scalar.as_py()
    except UnicodeDecodeError:
        return b""
    return found if isinstance(found, bytes | str) else b""


def open_table(path: Path, *, verify: bool = True) -> Any:
    """Open a file as a `ParquetFile`, or as an `ArrowFile`, which has the same reading methods. With `verify`, reading
    Parquet verifies the checksums of pages. Raises `UserError` if it is missing or neither."""
    if not path.is_file():
        raise UserError(f"no such data file: {path}.")
    try:
        if _is_arrow(path):
            return ArrowFile(path)
        return pq.ParquetFile(path, memory_map=verify, page_checksum_verification=verify)
    except UNREADABLE as error:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS)) == _LFS
        lfs = "it only says where Git LFS has it, run `git lfs pull` in its folder."
        raise UserError(f"{path} is no readable Parquet file: {lfs if is_pointer else first_line(error)}") from error


def read_column(path: Path, file: Any, column: str) -> Any:
    """Read and validate a whole column. Raises `UserError` if it is damaged."""
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


def fingerprint_of(path: Path) -> bytes:
    """Return what identifies a file's content, without reading every image: Parquet's footer (row counts, offsets,
    sizes, statistics); of Arrow a hash of its edges, labels and the sizes of its images."""
    if _is_arrow(path):
        sha = hashlib.sha256(str(path.stat().st_size).encode() + edges(path))
        file = ArrowFile(path)
        for batch in file.read(file.schema_arrow.names).to_batches():
            for column in batch.columns:
                sha.update(_summary(column))
        return sha.digest()
    with path.open("rb") as raw:
        raw.seek(-8, io.SEEK_END)
        length = int.from_bytes(raw.read(4), "little") + 8
        raw.seek(-length, io.SEEK_END)
        return raw.read()


def edges(path: Path) -> bytes:
    """Return a file's first and last MiB."""
    with path.open("rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, path.stat().st_size - _EDGE))
        return head + file.read()


def _is_arrow(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _ARROW


def _summary(column: Any) -> bytes:
    """Return bytes that summarise a column: numbers in full, lengths of binary values, structs field by field."""
    if pa.types.is_struct(column.type):
        return b"".join(_summary(column.field(i)) for i in range(column.type.num_fields))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column = pc.binary_length(column)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False).tobytes()
    return b""

"""Arrow files, as written by `datasets.Dataset.save_to_disk`, with the methods of `ParquetFile` that are used here."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_BEGINNINGS = (b"\xff\xff\xff\xff", b"ARRO")  # first bytes of a stream, and of a file
_EDGE = 1 << 20


def is_arrow(path: Path) -> bool:
    """Return whether a file begins like an Arrow stream or file."""
    with path.open("rb") as file:
        return file.read(4) in _BEGINNINGS


class ArrowFile:
    """A memory-mapped Arrow stream or file. Its record batches take the place of Parquet's row groups.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        source = pa.memory_map(str(path))
        with path.open("rb") as raw:
            is_file = raw.read(6) == b"ARROW1"
        if is_file:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            reader = pa.ipc.open_stream(source)
            self._batches = list(reader)
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


def fingerprint_bytes(path: Path) -> bytes:
    """Return a fingerprint of a file's content without reading every image: from its size, its first and last MiB, its
    labels and the sizes of its images."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as raw:
        digest.update(raw.read(_EDGE))
        raw.seek(max(0, size - _EDGE))
        digest.update(raw.read())
    file = ArrowFile(path)
    for batch in file.read(file.schema_arrow.names).to_batches():
        for column in batch.columns:
            digest.update(_short(column))
    return digest.digest()


def _short(column: Any) -> bytes:
    """Return bytes that summarise a column: numbers in full, lengths of binary values, structs field by field."""
    if pa.types.is_struct(column.type):
        return b"".join(_short(column.field(i)) for i in range(column.type.num_fields))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return pc.binary_length(column).to_numpy(zero_copy_only=False).tobytes()
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False).tobytes()
    return b""

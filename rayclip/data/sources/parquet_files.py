"""Source of Parquet files in the Hugging Face layout and its variants: labelled images, or images with captions."""

import bisect
import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayclip.data.columns import Columns, caption_texts, check_alike, find_columns, open_labels
from rayclip.data.labels import MISSING, Reading
from rayclip.data.layout import find_files, split_named_in
from rayclip.data.sources.base import Record, Shard, ShardedSource
from rayclip.data.tables import UNREADABLE, TableImages, checksums, encoded_image, fingerprint_of, open_table
from rayclip.types import UserError

_BATCH = 64  # rows turned into records at a time


class ParquetSource(ShardedSource):
    """Images of Parquet files, read one row group at a time, with labels or else captions (`columns`).

    Args:
        files: each split's files in order. Paths are opened now, shards only when their records are read, except for
            the first one, which determines the columns.
        captions: whether to read captions even if there are labels.
        description: for the manifest; None to derive it from the files' footers.

    Raises:
        UserError: a file is missing or not Parquet, has no images, neither labels nor captions, or no class names;
            labels do not fit the names (also later, when records are read); or the files do not belong together.
    """

    def __init__(
        self,
        files: Mapping[str, Sequence[Path | Shard]],
        name: str,
        captions: bool = False,
        description: Mapping[str, Any] | None = None,
        reading: Reading = Reading(),
    ) -> None:
        self._name, self._reading, self._captions = name, reading, captions
        paths = [f.absolute().parent for of_split in files.values() for f in of_split if isinstance(f, Path)]
        root = os.path.commonpath(paths) if paths else "."
        shards = {
            split: [f if isinstance(f, Shard) else Shard.local(f, os.path.relpath(f, root)) for f in of_split]
            for split, of_split in files.items()
        }
        super().__init__(shards, description or {})
        every = [shard for of_split in shards.values() for shard in of_split]
        if not every:
            raise UserError(f"data set '{name}' has no Parquet files: name at least one.")
        self._first = every[0]
        with _open(self._first, self._first.fetch()) as file:
            self._columns = self._find_columns(self._first, file)
        self._captions = self._columns.label is None
        here = [shard for shard in every if shard.cached() is not None]
        for shard in here:
            if not shard.remote:
                with _open(shard, shard.fetch()) as file:
                    check_alike(shard.name, self._find_columns(shard, file), self._first.name, self._columns)
        self._labels = None
        if self._columns.label:
            # Labels that can be read without a download; the others are checked when their records are read.
            seen = self._distinct_labels(here)
            known = None if any(shard.remote for shard in every) else seen
            from_1 = "add --labels-from 1"
            self._labels = open_labels(self._first.name, self._columns, known, reading, from_1=from_1)
            self._numbers = self._labels.numbers(self._first.name, seen)
            self.class_names, self.notes = self._labels.class_names, self._labels.notes
        if description is None:
            extra: dict[str, Any] = dict(reading.decisive())
            rows = [self._count(shard) or 0 for shard in every]
            local = [shard.fetch() for shard in every]
            if named := checksums(TableImages(rows, local.__getitem__, self._columns.image, name).paths()):
                extra["files"] = named
            self._description = {"kind": "parquet", "content": _fingerprint(shards, self.class_names, extra)}

    def _find_columns(self, shard: Shard, file: Any) -> Columns:
        return find_columns(shard.name, file.schema_arrow, self._reading, captions=self._captions)

    def _distinct_labels(self, shards: Sequence[Shard]) -> set[Any]:
        """Return the distinct labels, without damaged texts: rows with those get a `problem` when they are read."""
        found: set[Any] = set()
        for shard in shards:
            path = shard.fetch()
            with _open(shard, path) as file:
                for batch in _batches(shard, path, file, range(file.num_row_groups), [self._columns.label], 1 << 16):
                    for value in batch.column(0).unique():
                        with contextlib.suppress(UnicodeDecodeError):
                            found.add(value.as_py())
        return {None if value != value else value for value in found}

    def _count(self, shard: Shard) -> int | None:
        path = shard.cached()
        if path is None:
            return None
        with _open(shard, path) as file:
            return file.metadata.num_rows

    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        columns = [c for c in (self._columns.image, self._columns.label, self._columns.captions) if c]
        with _open(shard, path) as file:
            check_alike(shard.name, self._find_columns(shard, file), self._first.name, self._columns)
            ends = list(accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)))
            group = bisect.bisect_right(ends, start)  # first group that ends after `start`
            row = ends[group - 1] if group else 0
            for batch in _batches(shard, path, file, range(group, len(ends)), columns):
                images, values = batch.column(columns[0]), batch.column(columns[1])
                for i in range(max(0, start - row), batch.num_rows):
                    yield self._record(f"{shard.name}#{row + i}", path, encoded_image(images[i]), values[i])
                row += batch.num_rows
            return file.metadata.num_rows

    def _record(self, where: str, path: Path, image: bytes | str, scalar: Any) -> Record:
        read = partial(bytes, image) if isinstance(image, bytes) else (path.parent / image).read_bytes
        problem, label = None, None
        captions: tuple[str, ...] = ()
        try:
            value = scalar.as_py()
        except UnicodeDecodeError:
            return Record(path=where, read=read, problem="the row's text is damaged")
        if self._labels is None:
            captions = tuple(text.strip() for text in caption_texts(value) if text.strip())
            problem = None if captions else "the row has no caption"
        elif value is None or value != value:
            problem = "the row has no label"
        else:
            if value not in self._numbers:
                self._numbers |= self._labels.numbers(where, [value])
            if self._numbers[value] == MISSING:
                problem = "the row has no label (-1)"
            else:
                label = self._numbers[value] - self._labels.first
        if not image:
            problem = "the row has no image"
        elif isinstance(image, str) and not (path.parent / image).is_file():
            problem = f"the row has no image, and there is no file {image}"
        return Record(path=where, read=read, label=label, captions=captions, problem=problem)


def open_parquet(
    path: Path, name: str, split: str = "test", captions: bool = False, reading: Reading = Reading()
) -> ParquetSource:
    """Open a Parquet or Arrow file, used whole, or a folder in one of the forms that `layout.find_files` knows; `split`
    is for a file whose name does not indicate one. Raises `UserError`, see `ParquetSource`."""
    if path.is_file() or (path.suffix == ".parquet" and not path.is_dir()):
        return ParquetSource({split_named_in(path.stem) or split: [path]}, name, captions, reading=reading)
    if not path.is_dir():
        raise UserError(f"no such data file or folder: {path}.")
    files = find_files(path)
    if not files:
        raise UserError(
            f"folder {path} holds no Parquet data set: it needs train*.parquet, val*.parquet or test*.parquet, "
            "in it or in data/ below."
        )
    return ParquetSource({found or split: f for found, f in files.items()}, name, captions, reading=reading)


def _open(shard: Shard, path: Path) -> Any:
    """Open a file for a `with` block, without verifying checksums: a damaged page costs only its rows."""
    try:
        return closing(open_table(path, verify=False))
    except UserError as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if shard.remote or file.read(4) == b"PAR1":
                raise shard.damaged(path, error.__cause__) from error
        raise


def _batches(
    shard: Shard, path: Path, file: Any, groups: Iterable[int], columns: list[Any], size: int = _BATCH
) -> Iterator[pa.RecordBatch]:
    """Yield batches of rows, one row group at a time, since the reader keeps what it has decoded in memory."""
    try:
        for group in groups:
            yield from file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)
    except UNREADABLE as error:
        raise shard.damaged(path, error) from error


def _fingerprint(shards: Mapping[str, Sequence[Shard]], class_names: Sequence[str], extra: Mapping[str, Any]) -> str:
    """Hash the files' footers (row counts, offsets, sizes and statistics), their splits, class names and options."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    digest.update(json.dumps(extra).encode() if extra else b"")
    for split, of_split in shards.items():
        digest.update(f"\0{split}\0{len(of_split)}\0".encode())
        for shard in of_split:
            digest.update(fingerprint_of(shard.fetch()))
    return digest.hexdigest()[:16]

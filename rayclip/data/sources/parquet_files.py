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

from rayclip.data.columns import LabelColumn, caption_texts, declared_names, find_columns, open_labels
from rayclip.data.labels import MISSING
from rayclip.data.layout import find_files, split_named_in
from rayclip.data.sources.base import Record
from rayclip.data.sources.shards import Shard, ShardedSource, unreadable
from rayclip.data.spec import Reading
from rayclip.data.tables import UNREADABLE, TableImages, checksums, encoded_image, footer, open_table
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
        self._name, self._reading = name, reading
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
        first = every[0]
        with _open(first, first.fetch()) as file:
            self._columns = find_columns(first.name, file.schema_arrow, reading, captions=captions)
            self._declared = declared_names(file.schema_arrow, self._columns.label)
        local = [shard for shard in every if not shard.remote]
        for shard in local:
            with _open(shard, shard.fetch()) as file:
                self._check_alike(shard, file.schema_arrow)
        self._labels: LabelColumn | None = None
        if self._columns.label:
            # Labels that can be read without a download; the others are checked when their records are read.
            seen = self._distinct_labels([shard for shard in every if shard.cached() is not None])
            known = seen if len(local) == len(every) else None
            self._labels = open_labels(
                first.name, self._columns, self._declared, known, reading, from_1="add --labels-from 1"
            )
            self._labels.numbers(first.name, seen)
            self.class_names = self._labels.class_names
            self.notes = (self._labels.note,) if self._labels.note else ()
        if description is None:
            extra: dict[str, Any] = dict(reading.decisive())
            if named := self._named_files(every):
                extra["files"] = named
            self._description = {"kind": "parquet", "content": _fingerprint(shards, self.class_names, extra)}

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

    def _named_files(self, shards: Sequence[Shard]) -> list[int]:
        """Return checksums of the image files that rows name instead of holding bytes."""
        paths = [shard.fetch() for shard in shards]
        rows = [self._count(shard) or 0 for shard in shards]
        return checksums(TableImages(rows, paths.__getitem__, self._columns.image, self._name).paths())

    def _check_alike(self, shard: Shard, schema: pa.Schema) -> None:
        """Raise a `UserError` unless this file has the same columns and class names as the first."""
        columns = find_columns(shard.name, schema, self._reading, captions=not self._columns.label)
        for what, same in (
            ("has other columns", columns == self._columns),
            ("names other classes", declared_names(schema, self._columns.label) == self._declared),
        ):
            if not same:
                raise UserError(f"{shard.name} {what} than the first file of '{self._name}': give each its own.")

    def _count(self, shard: Shard) -> int | None:
        path = shard.cached()
        if path is None:
            return None
        with _open(shard, path) as file:
            return file.metadata.num_rows

    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        with _open(shard, path) as file:
            self._check_alike(shard, file.schema_arrow)
            ends = list(accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)))
            group = bisect.bisect_right(ends, start)  # first group that ends after `start`
            row = ends[group - 1] if group else 0
            for batch in _batches(shard, path, file, range(group, len(ends)), self._columns.names):
                images = batch.column(self._columns.image)
                for i in range(max(0, start - row), batch.num_rows):
                    yield self._record(f"{shard.name}#{row + i}", path, encoded_image(images[i]), batch, i)
                row += batch.num_rows
            return file.metadata.num_rows

    def _record(self, where: str, path: Path, image: bytes | str, batch: pa.RecordBatch, i: int) -> Record:
        problem, label = None, None
        captions: tuple[str, ...] = ()
        if not image:
            problem = "the row has no image"
        elif isinstance(image, str) and not (path.parent / image).is_file():
            problem = f"the row has no image, and there is no file {image}"
        if isinstance(image, str):
            read = (path.parent / image).read_bytes
        else:
            read = partial(bytes, image) if image else unreadable("the row has no image")
        try:
            value = batch.column(self._columns.label or self._columns.captions)[i].as_py()
        except UnicodeDecodeError:
            return Record(path=where, read=read, problem="the row's text is damaged")
        if self._labels is None:
            captions = tuple(text.strip() for text in caption_texts(value) if text.strip())
            problem = problem or (None if captions else "the row has no caption")
        else:
            number = self._labels.number(where, value)
            label = None if number == MISSING else number - self._labels.first
            if label is None:
                problem = problem or f"the row has no label{'' if value is None or value != value else ' (-1)'}"
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
    files = {found or split: paths for found, paths in find_files(path).items()}
    if files:
        return ParquetSource(files, name, captions, reading=reading)
    raise UserError(
        f"folder {path} holds no Parquet data set: it needs train*.parquet, val*.parquet or test*.parquet, "
        "in it or in data/ below."
    )


def _open(shard: Shard, path: Path) -> Any:
    """Open a file for a `with` block, without verifying checksums: a damaged page costs only its rows."""
    try:
        return closing(open_table(path, verify=False))
    except UserError as error:
        if path.is_file() and (shard.remote or _begins_as_parquet(path)):
            raise shard.damaged(path, error.__cause__) from error
        raise


def _begins_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


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
            digest.update(footer(shard.fetch()))
    return digest.hexdigest()[:16]

"""Source of Parquet files in the Hugging Face layout and its variants: labelled images, or images with captions."""

import bisect
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayclip.data.arrowfile import ArrowFile
from rayclip.data.columns import declared_names, find_columns, numbers_of
from rayclip.data.labels import MISSING, counted_from_1, explain_labels, with_given_names
from rayclip.data.layout import SPLITS, find_files
from rayclip.data.rowgroups import RowGroups, beside, checksums, footer, is_arrow, lfs_pointer
from rayclip.data.sources.base import Record
from rayclip.data.sources.shards import Shard, Sharded, unreadable
from rayclip.data.spec import Reading
from rayclip.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 64  # rows turned into records at a time


class ParquetSource(Sharded):
    """Images of Parquet files, read one row group at a time.

    Columns are detected if there is only one of each kind (`columns`): images (struct<bytes, path>, binary, or paths of
    image files); labels (whole numbers, booleans or text); captions `captions`, `caption`, `sentences`, `text` or `raw`
    (text, or a list of texts or of structs with `raw`). Captions are read if there is no label.

    Args:
        files: each split's files in order. Paths are opened now, shards only when their records are read, except for
            the first one, which determines the columns.
        name: name of the data set, for messages.
        class_names: used if the files themselves name no classes; empty for captions; None to detect: text labels then
            have the sorted distinct texts of all files as class names.
        description: for the manifest; None to derive it from the files' footers.
        reading: columns, class names, and the label of the first class.

    Raises:
        UserError: a file is missing or not Parquet, has no images, neither labels nor captions, or no class names;
            labels do not fit the names (also later, when records are read); or the files do not belong together.
    """

    def __init__(
        self,
        files: Mapping[str, Sequence[Path | Shard]],
        name: str,
        class_names: tuple[str, ...] | None = None,
        description: Mapping[str, Any] | None = None,
        reading: Reading = Reading(),
    ) -> None:
        self._name, self._reading = name, reading
        root = _common_folder([f for of_split in files.values() for f in of_split if isinstance(f, Path)])
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
            self._columns = find_columns(first.name, file.schema_arrow, reading, captions=class_names == ())
            self._declared = declared_names(file.schema_arrow, self._columns.label)
        for shard in every[1:]:
            if not shard.remote:
                with _open(shard, shard.fetch()) as file:
                    self._check_alike(shard, file.schema_arrow)
        if self._columns.label:
            self._choose_names(class_names, every)
        if description is None:
            extra: dict[str, Any] = dict(reading.decisive())
            if named := self._named_files(every):
                extra["files"] = named
            self._description = {"kind": "parquet", "content": _fingerprint(shards, self.class_names, extra)}

    def _choose_names(self, class_names: tuple[str, ...] | None, shards: Sequence[Shard]) -> None:
        """Set the class names and the label of each; check all labels that can be read without a download."""
        given = self._reading.class_names()
        named = self._declared or given or class_names
        # Labels that can be read without a download; the others are checked when their records are read.
        seen = self._distinct_labels([shard for shard in shards if shard.cached() is not None])
        if named is None and self._columns.text_labels and not any(shard.remote for shard in shards):
            named = tuple(sorted(str(text) for text in seen if text is not None))
        if named is None:
            if self._columns.text_labels:
                raise UserError(
                    f"the labels of '{self._name}' are text and no class names go with them: give --class-names FILE, "
                    "or download its files and give their folder."
                )
            raise UserError(
                f"{shards[0].name} names no classes: give --class-names FILE, a name a line in label order; the "
                f"datasets library writes them as a ClassLabel for '{self._columns.label}' under the key 'huggingface' "
                "of the schema metadata."
            )
        first = self._reading.labels_from
        texts = named if self._columns.text_labels else ()
        self._number = {text: number for number, text in enumerate(texts, start=first)}
        self.class_names = named
        if given is not None:
            self.class_names, note = with_given_names(named, given, str(self._reading.names))
            self.notes = (note,) if note else ()
        column = str(self._columns.label)
        self._refuse(shards[0].name, numbers_of(shards[0].name, column, seen, self._number).values())

    def _refuse(self, where: str, labels: Iterable[int]) -> None:
        """Raise a `UserError` unless the labels fit the class names. Records are not set aside for a label that does
        not fit, since then other labels may be shifted."""
        found, classes, first = list(labels), len(self.class_names), self._reading.labels_from
        wrong = explain_labels(found, classes, first)
        if wrong is None:
            return
        if counted_from_1(found, classes, first):
            raise UserError(f"{where} has {wrong}: add --labels-from 1.")
        raise UserError(
            f"{where} has {wrong}: name every class with --class-names FILE, a name a line in label order, or correct "
            "the labels."
        )

    def _distinct_labels(self, shards: Sequence[Shard]) -> set[Any]:
        found: set[Any] = set()
        for shard in shards:
            path = shard.fetch()
            with _open(shard, path) as file:
                for batch in _batches(shard, path, file, range(file.num_row_groups), [self._columns.label], 1 << 16):
                    found.update(_readable(batch.column(0)))
        return {None if value != value else value for value in found}

    def _named_files(self, shards: Sequence[Shard]) -> list[int]:
        """Return checksums of the image files that rows name instead of holding bytes."""
        paths = [shard.fetch() for shard in shards]
        rows = []
        for shard, path in zip(shards, paths, strict=True):
            with _open(shard, path) as file:
                rows.append(file.metadata.num_rows)
        return checksums(RowGroups(rows, paths.__getitem__, self._columns.image, self._name).paths())

    def _check_alike(self, shard: Shard, schema: "pa.Schema") -> None:
        """Raise a `UserError` unless this file has the same columns and class names as the first."""
        if find_columns(shard.name, schema, self._reading, captions=not self._columns.label) != self._columns:
            raise UserError(f"{shard.name} has other columns than the first file of '{self._name}': give each its own.")
        if declared_names(schema, self._columns.label) != self._declared:
            raise UserError(
                f"{shard.name} names other classes than the first file of '{self._name}': give each its own."
            )

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
                for i in range(max(0, start - row), batch.num_rows):
                    yield self._record(f"{shard.name}#{row + i}", path, batch, i)
                row += batch.num_rows
            return file.metadata.num_rows

    def _record(self, where: str, path: Path, batch: "pa.RecordBatch", i: int) -> Record:
        found = _image(batch.column(self._columns.image)[i])
        missing = None if found else "the row has no image"
        if isinstance(found, str):
            read = beside(path, found).read_bytes
            missing = None if beside(path, found).is_file() else f"the row has no image, and there is no file {found}"
        else:
            read = _bytes_reader(found) if found else unreadable("the row has no image")
        try:
            value = batch.column(self._columns.label or self._columns.captions)[i].as_py()
        except UnicodeDecodeError:
            return Record(path=where, read=read, problem="the row's text is damaged")
        if self._columns.label:
            label, problem = self._label(where, value)
            return Record(path=where, read=read, label=label, problem=missing or problem)
        captions = _captions(value)
        problem = None if captions else "the row has no caption"
        return Record(path=where, read=read, captions=captions, problem=missing or problem)

    def _label(self, where: str, value: Any) -> tuple[int | None, str | None]:
        if value is None or value != value:
            return None, "the row has no label"
        number = numbers_of(where, str(self._columns.label), [value], self._number)[value]
        if number == MISSING:
            return None, "the row has no label (-1)"
        self._refuse(where, [number])
        return number - self._reading.labels_from, None


def open_parquet(
    path: Path,
    name: str,
    split: str = "test",
    class_names: tuple[str, ...] | None = None,
    reading: Reading = Reading(),
) -> ParquetSource:
    """Open a Parquet or Arrow file, or a folder of them.

    Args:
        path: a file, used whole; or a folder in one of the forms that `layout.find_files` knows.
        name: name of the data set, for messages.
        split: used for a file whose name does not indicate one (as `train-0.parquet`, `cifar10-test.parquet` do).
        class_names, reading: see `ParquetSource`.

    Raises:
        UserError: no such data, or see `ParquetSource`.
    """
    if path.is_file() or (path.suffix == ".parquet" and not path.is_dir()):
        words = re.split(r"[^a-z]+", path.stem.lower())
        told = (own for own, spellings in SPLITS.items() if not set(spellings).isdisjoint(words))
        return ParquetSource({next(told, split): [path]}, name, class_names, reading=reading)
    if not path.is_dir():
        raise UserError(f"no such data file or folder: {path}.")
    files = {found or split: paths for found, paths in find_files(path).items()}
    if files:
        return ParquetSource(files, name, class_names, reading=reading)
    raise UserError(
        f"folder {path} holds no Parquet data set: it needs train*.parquet, val*.parquet or test*.parquet, "
        "in it or in data/ below."
    )


def _open(shard: Shard, path: Path) -> Any:
    """Open a `ParquetFile`, or an `ArrowFile`, which has the same reading methods."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"no such data file: {path}.")
    try:
        return ArrowFile(path) if is_arrow(path) else pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # invalid UTF-8 is a ValueError
        reason = (lfs_pointer(path) or str(error).splitlines()[0]).rstrip(".")
        with path.open("rb") as raw:
            begins = raw.read(4)
        if shard.remote or begins == b"PAR1":
            raise shard.damaged(path, reason) from error
        raise UserError(f"{path} is no readable Parquet file: {reason}.") from error


def _batches(
    shard: Shard, path: Path, file: Any, groups: Sequence[int], columns: list[Any], size: int = _BATCH
) -> Iterator["pa.RecordBatch"]:
    """Yield batches of rows, one row group at a time, since the reader keeps what it has decoded in memory."""
    import pyarrow as pa

    try:
        for group in groups:
            yield from file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise shard.damaged(path, error) from error


def _captions(value: Any) -> tuple[str, ...]:
    """Return the non-empty captions of a value: one or several, as text or as structs with `raw`."""
    values = value if isinstance(value, list) else [value]
    texts = ((v.get("raw") if isinstance(v, dict) else v) or "" for v in values)
    return tuple(text.strip() for text in texts if text.strip())


def _image(scalar: Any) -> bytes | str | None:
    """Return the image's bytes, or the path given instead; the path is ignored if there are bytes."""
    import pyarrow as pa

    if not isinstance(scalar, pa.StructScalar):
        try:
            return scalar.as_py()
        except UnicodeDecodeError:
            return None
    if not scalar.is_valid:
        return None
    data = scalar["bytes"].as_py() if "bytes" in scalar else None
    if data is not None or "path" not in scalar:
        return data
    try:
        return scalar["path"].as_py()
    except UnicodeDecodeError:
        return None


def _readable(values: Any) -> list[Any]:
    """Return the distinct values without damaged texts; rows with those get a `problem` when they are read."""
    try:
        return list(values.unique().to_pylist())
    except UnicodeDecodeError:
        found = []
        for value in values.unique():
            with contextlib.suppress(UnicodeDecodeError):
                found.append(value.as_py())
        return found


def _bytes_reader(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _common_folder(paths: Sequence[Path]) -> str:
    return os.path.commonpath([p.absolute().parent for p in paths]) if paths else "."


def _fingerprint(shards: Mapping[str, Sequence[Shard]], class_names: Sequence[str], extra: Mapping[str, Any]) -> str:
    """Hash the files' footers (row counts, offsets, sizes and statistics), their splits, class names and options."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    digest.update(json.dumps(extra).encode() if extra else b"")
    for split, of_split in shards.items():
        digest.update(f"\0{split}\0{len(of_split)}\0".encode())
        for shard in of_split:
            digest.update(footer(shard.fetch()))
    return digest.hexdigest()[:16]

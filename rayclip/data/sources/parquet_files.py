"""Parquet in the Hugging Face layout, as it is found in the wild: labelled images, or images with captions."""

import bisect
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayclip.data.rowgroups import footer
from rayclip.data.sources.base import Record
from rayclip.data.sources.shards import SPLITS, Shard, Sharded, unreadable
from rayclip.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGES = ("image", "img", "jpg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "cls", "class")
CAPTIONS = ("captions", "caption", "sentences", "text", "raw")

_SPLITS = {"train": ("train",), "val": ("val",), "test": ("test",)}  # `val` begins `valid` and `validation` as well
_BATCH = 64  # rows turned into records at a time


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Which columns of a file are read. Exactly one of `label` and `captions` is given."""

    image: str
    label: str | None
    captions: str | None
    text_labels: bool

    @property
    def names(self) -> list[str]:
        return [c for c in (self.image, self.label, self.captions) if c]


class ParquetSource(Sharded):
    """Images of Parquet files, read a row group at a time.

    Columns, the first found of each kind: image `image`, `img`, `jpg`, `png` or `webp` (struct<bytes, path> or binary);
    label `label`, `labels`, `fine_label`, `cls` or `class` (integers or text); captions `captions`, `caption`,
    `sentences`, `text` or `raw` (text, or a list of texts or of structs with `raw`). Captions are read where there is
    no label.

    Args:
        files: each split's files in order. Paths are looked at now, shards when their turn comes, except for the
            first one, which tells the columns.
        name: of the data set, for messages.
        class_names: where the files themselves name no classes; empty for captions; None to find out. Text labels
            have the sorted distinct texts of all files for class names then.
        description: for the manifest; None for what the files' footers tell.

    Raises:
        UserError: a file is missing or no Parquet, has no images, neither labels nor captions, names no classes, or
            the files do not belong together.
    """

    def __init__(
        self,
        files: Mapping[str, Sequence[Path | Shard]],
        name: str,
        class_names: tuple[str, ...] | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = name
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
            self._columns = _columns(first, file.schema_arrow, captions=class_names == ())
            self._declared = _declared_names(file.schema_arrow, self._columns.label)
        for shard in every[1:]:
            if not shard.remote:
                with _open(shard, shard.fetch()) as file:
                    self._check_alike(shard, file.schema_arrow)
        if self._columns.label:
            self.class_names = self._declared or class_names or self._distinct_labels(every)
        self._number = {text: number for number, text in enumerate(self.class_names)}
        if description is None:
            self._description = {"kind": "parquet", "content": _fingerprint(shards, self.class_names)}

    def _distinct_labels(self, shards: Sequence[Shard]) -> tuple[str, ...]:
        if not self._columns.text_labels:
            raise UserError(
                f"{shards[0].name} names no classes: its schema metadata needs the key 'huggingface' with a ClassLabel "
                f"for '{self._columns.label}', as the datasets library writes it."
            )
        if any(shard.remote for shard in shards):
            raise UserError(
                f"the labels of '{self._name}' are text and no class names go with them: download its files and give "
                "their folder."
            )
        label = self._columns.label
        found: set[str] = set()
        for shard in shards:
            path = shard.fetch()
            with _open(shard, path) as file:
                for batch in _batches(shard, path, file, range(file.num_row_groups), [label]):
                    found.update(text for text in batch.column(0).unique().to_pylist() if text is not None)
        return tuple(sorted(found))

    def _check_alike(self, shard: Shard, schema: "pa.Schema") -> None:
        """Raise a `UserError` unless a label means the same in this file as in the first."""
        if _columns(shard, schema, captions=not self._columns.label) != self._columns:
            raise UserError(f"{shard.name} has other columns than the first file of '{self._name}': give each its own.")
        if _declared_names(schema, self._columns.label) != self._declared:
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
            group = bisect.bisect_right(ends, start)  # the groups before it end before `start`
            row = ends[group - 1] if group else 0
            for batch in _batches(shard, path, file, range(group, len(ends)), self._columns.names):
                for i in range(max(0, start - row), batch.num_rows):
                    yield self._record(f"{shard.name}#{row + i}", batch, i)
                row += batch.num_rows
            return file.metadata.num_rows

    def _record(self, where: str, batch: "pa.RecordBatch", i: int) -> Record:
        data = _image_bytes(batch.column(self._columns.image)[i])
        missing = None if data else "the row has no image"
        read = _bytes_reader(data) if data else unreadable("the row has no image")
        try:
            value = batch.column(self._columns.label or self._columns.captions)[i].as_py()
        except UnicodeDecodeError:
            return Record(path=where, read=read, problem="the row's text is damaged")
        if self._columns.label:
            label, problem = self._label(value)
            return Record(path=where, read=read, label=label, problem=missing or problem)
        captions = _captions(value)
        problem = None if captions else "the row has no caption"
        return Record(path=where, read=read, captions=captions, problem=missing or problem)

    def _label(self, value: Any) -> tuple[int | None, str | None]:
        if value is None:
            return None, "the row has no label"
        number = self._number.get(value, -1) if self._columns.text_labels else value
        if 0 <= number < len(self.class_names):
            return number, None
        if number == -1 and not self._columns.text_labels:
            return None, "the row has no label (-1)"
        return None, f"label {value!r} is none of the {len(self.class_names)} classes"


def open_parquet(
    path: Path, name: str, split: str = "test", class_names: tuple[str, ...] | None = None
) -> ParquetSource:
    """A Parquet file, or a folder of them.

    Args:
        path: a file, taken whole; or a folder with `train*.parquet`, `val*.parquet` and `test*.parquet`, at least one
            of them, in it or in `data/` below.
        name: of the data set, for messages.
        split: of a file whose name does not tell (`train-0.parquet`, `cifar10-test.parquet`).
        class_names: see `ParquetSource`.

    Raises:
        UserError: nothing there, or see `ParquetSource`.
    """
    if path.is_file() or path.suffix == ".parquet":
        words = re.split(r"[^a-z]+", path.stem.lower())
        told = (own for own, spellings in SPLITS.items() if not set(spellings).isdisjoint(words))
        return ParquetSource({next(told, split): [path]}, name, class_names)
    if not path.is_dir():
        raise UserError(f"no such data file or folder: {path}.")
    for folder in (path, path / "data"):
        files = {
            split: sorted(f for prefix in prefixes for f in folder.glob(f"{prefix}*.parquet"))
            for split, prefixes in _SPLITS.items()
        }
        if any(files.values()):
            return ParquetSource({split: of_split for split, of_split in files.items() if of_split}, name, class_names)
    raise UserError(
        f"folder {path} holds no Parquet data set: it needs train*.parquet, val*.parquet or test*.parquet, "
        "in it or in data/ below."
    )


def _open(shard: Shard, path: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"no such data file: {path}.")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # bytes that are no UTF-8 are a ValueError
        reason = str(error).splitlines()[0].rstrip(".")
        with path.open("rb") as raw:
            begins = raw.read(4)
        if shard.remote or begins == b"PAR1":
            raise shard.damaged(path, reason) from error
        raise UserError(f"{path} is no readable Parquet file: {reason}.") from error


def _batches(
    shard: Shard, path: Path, file: "pq.ParquetFile", groups: Sequence[int], columns: list[Any]
) -> Iterator["pa.RecordBatch"]:
    """Rows of these row groups, of one group at a time: the reader holds on to what it has decoded."""
    import pyarrow as pa

    try:
        for group in groups:
            yield from file.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise shard.damaged(path, error) from error


def _columns(shard: Shard, schema: "pa.Schema", *, captions: bool) -> _Columns:
    """The columns to read; `captions` where labels, if any, are not wanted."""
    from pyarrow import types

    def find(candidates: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        return next((c for c in candidates if schema.get_field_index(c) >= 0 and fits(schema.field(c).type)), None)

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        return is_bytes(kind)

    def is_captions(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        if types.is_struct(kind):
            return kind.get_field_index("raw") >= 0 and is_text(kind.field("raw").type)
        return is_text(kind)

    image = find(IMAGES, is_image)
    if image is None:
        raise UserError(
            f"{shard.name} has no image column (its columns: {', '.join(schema.names)}): write it in the Hugging Face "
            "layout, 'image' being struct<bytes, path>."
        )
    label = None if captions else find(LABELS, lambda kind: types.is_integer(kind) or is_text(kind))
    if label:
        return _Columns(image=image, label=label, captions=None, text_labels=is_text(schema.field(label).type))
    found = find(CAPTIONS, is_captions)
    if found is None:
        wanted = "captions, a column 'captions'" if captions else "labels or captions, a column 'label' or 'captions'"
        raise UserError(f"{shard.name} has no {wanted} (its columns: {', '.join(schema.names)}).")
    return _Columns(image=image, label=None, captions=found, text_labels=False)


def _declared_names(schema: "pa.Schema", label: str | None) -> tuple[str, ...]:
    """Class names in the schema's metadata, empty where it has none."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _captions(value: Any) -> tuple[str, ...]:
    """One caption or several, as text or as structs with `raw`; empty ones are left out."""
    values = value if isinstance(value, list) else [value]
    texts = ((v.get("raw") if isinstance(v, dict) else v) or "" for v in values)
    return tuple(text.strip() for text in texts if text.strip())


def _image_bytes(scalar: Any) -> bytes | None:
    """Of a struct only the bytes are looked at: its path may be no text."""
    import pyarrow as pa

    return (scalar["bytes"] if isinstance(scalar, pa.StructScalar) and scalar.is_valid else scalar).as_py()


def _bytes_reader(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _common_folder(paths: Sequence[Path]) -> str:
    return os.path.commonpath([p.absolute().parent for p in paths]) if paths else "."


def _fingerprint(shards: Mapping[str, Sequence[Shard]], class_names: Sequence[str]) -> str:
    """A hash of the files' footers (row counts, offsets, sizes and statistics) and of what they are taken for."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for split, of_split in shards.items():
        digest.update(f"\0{split}\0{len(of_split)}\0".encode())
        for shard in of_split:
            digest.update(footer(shard.fetch()))
    return digest.hexdigest()[:16]

"""Write one Parquet shard of a prepared data set, and the index of its images."""

import hashlib
import io
import json
import mmap
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.manifest import RECIPE, ShardFile
from rayclip.data.prepared import INDEX
from rayclip.data.sources.base import Record
from rayclip.store import Store

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Target sizes of shards and row groups, in bytes of images.

    Attributes:
        shard: size of a Parquet file.
        group: size of a row group. Small ones make random access cheap in a shuffled epoch, since a row group is the
            smallest unit that Parquet readers can read.
    """

    shard: int = 256 << 20
    group: int = 1 << 20


class WrittenShard(ShardFile):
    """A shard with the SHA-256 of its part of the index; empty if an earlier version wrote it."""

    part: str = ""


class ShardWriter:
    """Writer of one Parquet shard to a temporary place; `commit` moves it to its final place."""

    def __init__(
        self, store: Store, file: str, layout: Layout, class_names: Sequence[str], raw_names: Sequence[str]
    ) -> None:
        self._store, self._file, self._group_bytes = store, file, layout.group
        self._labelled = bool(class_names)
        self._schema = _schema(class_names, raw_names)
        self._rows: list[dict[str, Any]] = []
        self._labels: list[int] = []
        self._pending = self.bytes = 0
        self._content = hashlib.sha256()
        # Below a local root the temporary file is in the same folder, so that it can be renamed; object stores get an
        # upload.
        where = store.path("") if store.is_local else None
        if where is not None:
            where.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=".partial-", dir=where)
        self._path = Path(self._folder.name) / file
        self._writer = pq.ParquetWriter(
            self._path,
            self._schema,
            compression="none",  # images are compressed already
            use_dictionary=False,
            write_statistics=["label"] if self._labelled else False,  # statistics of images would contain images
            write_page_checksum=True,
        )

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            self._folder.cleanup()

    def add(self, record: Record, data: bytes) -> None:
        key = "label" if self._labelled else "captions"
        target: Any = record.label if self._labelled else [c.strip() for c in record.captions if c.strip()]
        self._labels.append(target if self._labelled else -1)
        self._content.update(len(data).to_bytes(8, "little") + data + json.dumps(target).encode())
        self._rows.append({"image": {"bytes": data, "path": record.path}, key: target})
        self._pending += len(data)
        self.bytes += len(data)
        if self._pending >= self._group_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=len(self._rows))
        self._rows, self._pending = [], 0

    def commit(self) -> WrittenShard:
        self._flush()
        self._writer.close()
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        part = npy_bytes(_index(self._path, self._labels))
        written = WrittenShard(
            file=self._file,
            bytes=self._path.stat().st_size,
            sha256=sha256,
            rows=len(self._labels),
            content=self._content.hexdigest(),
            part=hashlib.sha256(part).hexdigest(),
        )
        self._store.write(part_name(self._file), part)
        self._store.upload(self._path, self._file)
        return written


def part_name(shard: str) -> str:
    """Return the file name of one shard's index, which is kept until the split is done and has a single index."""
    return f"{shard.removesuffix('.parquet')}.part.npy"


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _index(path: Path, labels: Sequence[int]) -> np.ndarray:
    """Build the index of a Parquet file's images, written without compression and dictionaries."""
    file = pq.ParquetFile(path)
    index = np.zeros(len(labels), INDEX)
    index["label"] = labels
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


def _schema(class_names: Sequence[str], raw_names: Sequence[str]) -> pa.Schema:
    """Return the Hugging Face schema; the raw class names are stored in its metadata under the key `rayclip`."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if class_names:
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
        target = pa.field("label", pa.int64())
    else:  # as datasets 2 and later read it
        features["captions"] = {"_type": "Sequence", "feature": {"dtype": "string", "_type": "Value"}}
        target = pa.field("captions", pa.list_(pa.string()))
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "rayclip": json.dumps({"recipe": RECIPE, "raw_names": list(raw_names)}),
    }
    return pa.schema([pa.field("image", _IMAGE), target], metadata)

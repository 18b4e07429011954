"""Write one Parquet shard of a prepared data set, and the index of its images."""

import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.manifest import RECIPE, ShardFile
from rayclip.data.mapped import index_of
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


class ShardWriter:
    """Writer of one Parquet shard to a temporary place; `commit` moves it to its final place."""

    def __init__(
        self, store: Store, file: str, layout: Layout, class_names: Sequence[str], raw_names: Sequence[str]
    ) -> None:
        self._store, self._file, self._group_bytes = store, file, layout.group
        self._labelled = bool(class_names)
        self._schema = schema(class_names, raw_names)
        self._rows: list[dict[str, Any]] = []
        self._labels: list[int] = []
        self._pending = self.bytes = self._count = 0
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
        row: dict[str, Any] = {"image": {"bytes": data, "path": record.path}}
        if self._labelled:
            assert record.label is not None  # guaranteed by `prepare._examine`
            row["label"] = record.label
            self._labels.append(record.label)
        else:
            row["captions"] = [c.strip() for c in record.captions if c.strip()]
        self._content.update(len(data).to_bytes(8, "little") + data)
        self._content.update(json.dumps(row["label"] if self._labelled else row["captions"]).encode())
        self._rows.append(row)
        self._count += 1
        self._pending += len(data)
        self.bytes += len(data)
        if self._pending >= self._group_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=len(self._rows))
        self._rows, self._pending = [], 0

    def commit(self) -> ShardFile:
        self._flush()
        self._writer.close()
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._path.stat().st_size
        buffer = io.BytesIO()
        np.save(buffer, index_of(self._path, self._labels if self._labelled else None), allow_pickle=False)
        self._store.write(part_name(self._file), buffer.getvalue())
        self._store.upload(self._path, self._file)
        return ShardFile(
            file=self._file, bytes=size, sha256=sha256, rows=self._count, content=self._content.hexdigest()
        )


def part_name(shard: str) -> str:
    """Return the file name of one shard's index, which is kept until the split is done and has a single index."""
    return f"{shard.removesuffix('.parquet')}.part.npy"


def schema(class_names: Sequence[str], raw_names: Sequence[str]) -> pa.Schema:
    """Return the Hugging Face schema; the raw class names are stored in its metadata under the key `rayclip`."""
    image = pa.field("image", _IMAGE)
    if not class_names:
        features: dict[str, Any] = {
            "image": {"_type": "Image"},
            "captions": {"_type": "Sequence", "feature": {"dtype": "string", "_type": "Value"}},  # since datasets 2
        }
        fields = [image, pa.field("captions", pa.list_(pa.string()))]
    else:
        features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
        fields = [image, pa.field("label", pa.int64())]
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "rayclip": json.dumps({"recipe": RECIPE, "raw_names": list(raw_names)}),
    }
    return pa.schema(fields, metadata)

"""Parquet in the Hugging Face image-classification layout.

`image: struct<bytes, path>`, `label: int64`, class names under `huggingface` in the schema metadata; one file or
several shards.
"""

import bisect
import hashlib
import io
import itertools
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from rayclip.data.images import ImageSet
from rayclip.types import UserError

_CACHE_BYTES = 2 << 30  # encoded images kept in memory per data set and process


class ParquetImages(ImageSet):
    """Images of one or several Parquet files, read a row group at a time and kept in a bounded cache.

    Raises:
        UserError: a file is missing or no Parquet, has no images, labels or class names, or labels outside them.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self._files = [_open(path) for path in paths]
        schema = self._files[0].schema_arrow
        self._image_column = next((c for c in ("image", "img") if c in schema.names), None)
        if self._image_column is None:
            raise UserError(
                f"{paths[0]} has no column 'image': write it in the Hugging Face layout "
                "(image: struct<bytes, path>, label: int64)."
            )
        if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
            raise UserError(
                f"{paths[0]} has no integer column 'label': classification needs labelled images "
                "(image: struct<bytes, path>, label: int64)."
            )
        self.class_names = _class_names(paths[0], schema)
        columns = [f.read(columns=["label"])["label"].to_numpy() for f in self._files]
        self.labels = np.concatenate(columns).astype(np.int64)
        self.ids = np.arange(len(self.labels))
        if len(self.labels) == 0:
            raise UserError(f"{paths[0]} holds no rows.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(
                f"{paths[0]} has labels from {low} to {high} but {len(self.class_names)} class names: "
                "labels must be 0 .. classes-1."
            )
        self._groups = [(f, g) for f in self._files for g in range(f.num_row_groups)]
        sizes = [f.metadata.row_group(g).num_rows for f, g in self._groups]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._cache: OrderedDict[int, list[bytes]] = OrderedDict()
        self._cached_bytes = 0
        self.fingerprint = _fingerprint(paths)

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        return [self._decode(p) for p in positions]

    def _decode(self, position: int) -> Image.Image:
        group = bisect.bisect_right(self._starts, position) - 1
        data = self._row_group(group)[position - self._starts[group]]
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError, TypeError) as error:
            raise UserError(f"row {position} of '{self.name}' is no readable image: mend or drop it.") from error

    def _row_group(self, group: int) -> list[bytes]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, index = self._groups[group]
        column = file.read_row_group(index, columns=[self._image_column])[self._image_column]
        rows = pa.compute.struct_field(column, "bytes").to_pylist()
        self._cache[group] = rows
        self._cached_bytes += sum(len(r or b"") for r in rows)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= sum(len(r or b"") for r in dropped)
        return rows


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no such data file: {path}.")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _class_names(path: Path, schema: Any) -> tuple[str, ...]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} names no classes: its schema metadata needs the key 'huggingface' with a ClassLabel "
            "for 'label', as the datasets library writes it."
        ) from None
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError(f"{path} must name at least two classes, each once; it names {len(names)}.")
    return names


def _fingerprint(paths: Sequence[Path]) -> str:
    """A hash of the files' footers: row counts, offsets, sizes and statistics, without reading every image."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            file.seek(-8, io.SEEK_END)
            footer = int.from_bytes(file.read(4), "little") + 8
            file.seek(-footer, io.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]

"""The user's own Parquet in the Hugging Face image-classification layout.

`image: struct<bytes, path>`, `label: int64`, class names under `huggingface` in the schema metadata; one file or
several shards.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayclip.data.encoded import EncodedImages, preparing
from rayclip.data.images import ImageSet
from rayclip.data.rowgroups import RowGroups, footer, open_parquet, read_column
from rayclip.types import UserError


class ParquetImages(EncodedImages, ImageSet):
    """Images of one or several Parquet files.

    Raises:
        UserError: a file is missing, no Parquet or damaged, has no images, labels or class names, labels outside
            them, or other classes than the first one.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self.paths = tuple(paths)
        files = [open_parquet(path) for path in paths]
        image_column = _image_column(paths[0], files[0].schema_arrow)
        self.class_names = self.raw_names = class_names_of(paths[0], files[0].schema_arrow)
        for path, file in zip(paths[1:], files[1:], strict=True):
            alike = _image_column(path, file.schema_arrow) == image_column
            if not alike or class_names_of(path, file.schema_arrow) != self.class_names:
                raise UserError(f"{path} names other classes or columns than {paths[0]}: give each file by itself.")
        columns = [read_column(path, file, "label") for path, file in zip(paths, files, strict=True)]
        if any(c.null_count for c in columns):
            raise UserError(
                f"{paths[0]} has images without a label: set them aside with `{preparing(name, self.paths)}`."
            )
        self.labels = np.concatenate([c.to_numpy() for c in columns]).astype(np.int64)
        self.ids = np.arange(len(self.labels))
        if len(self.labels) == 0:
            raise UserError(f"{paths[0]} holds no rows.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(
                f"{paths[0]} has labels from {low} to {high} but {len(self.class_names)} class names: "
                f"labels must be 0 .. classes-1; set the others aside with `{preparing(name, self.paths)}`."
            )
        self.encoded = RowGroups([f.metadata.num_rows for f in files], self.paths.__getitem__, image_column, name)
        self.fingerprint = footers_fingerprint(paths)


def _image_column(path: Path, schema: Any) -> str:
    column = next((c for c in ("image", "img") if c in schema.names), None)
    if column is None:
        raise UserError(
            f"{path} has no column 'image': write it in the Hugging Face layout "
            "(image: struct<bytes, path>, label: int64), or let `rayclip data prepare` do it."
        )
    if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
        raise UserError(
            f"{path} has no integer column 'label': classification needs labelled images "
            "(image: struct<bytes, path>, label: int64)."
        )
    return column


def class_names_of(path: Path, schema: Any) -> tuple[str, ...]:
    """The class names in a file's schema metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        listed = features["label"]["names"]
        names = tuple(listed) if isinstance(listed, list) and all(isinstance(n, str) for n in listed) else None
    except (KeyError, TypeError, ValueError):
        names = None
    if names is None:
        raise UserError(
            f"{path} names no classes: its schema metadata needs the key 'huggingface' with a ClassLabel "
            "for 'label', as the datasets library writes it."
        )
    # Equal names are allowed: ImageNet's curated list has two classes "missile" and two "sunglasses".
    if len(names) < 2:
        raise UserError(f"{path} must name at least two classes; it names {len(names)}.")
    return names


def footers_fingerprint(paths: Sequence[Path]) -> str:
    """A hash of the files' footers: row counts, offsets, sizes and statistics, without reading every image."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(footer(path))
    return digest.hexdigest()[:16]

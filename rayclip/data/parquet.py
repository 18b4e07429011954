"""The user's own Parquet files in the Hugging Face image-classification layout.

`image: struct<bytes, path>`, `label: int64`, class names under `huggingface` in the schema metadata; one file or
several shards. Other column names, label types and image types are read if the choice is unambiguous (`columns`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rayclip.data.columns import declared_names, find_columns, open_labels
from rayclip.data.encoded import EncodedImages, prepare_command
from rayclip.data.images import ImageSet
from rayclip.data.labels import MISSING, notes_on_classes
from rayclip.data.spec import Reading
from rayclip.data.tables import TableImages, checksums, footers_fingerprint, open_table, read_column
from rayclip.types import UserError


class ParquetImages(EncodedImages, ImageSet):
    """Labelled images of one or several Parquet or Arrow files.

    Raises:
        UserError: a file is missing, damaged or not Parquet; has no images, labels or class names, or labels outside
            the class names; has other classes than the first file; or names only image files that do not exist.
    """

    def __init__(self, paths: Sequence[Path], name: str, reading: Reading = Reading()) -> None:
        self.name, self.paths, self._reading = name, tuple(paths), reading
        first = paths[0]
        option = f"{first if len(paths) == 1 else first.parent}#{{}}={{}}"
        files = [open_table(path) for path in paths]
        columns, *others = [
            find_columns(str(path), file.schema_arrow, reading, option=option)
            for path, file in zip(paths, files, strict=True)
        ]
        label = columns.label
        if label is None:
            raise UserError(
                f"{first} has captions and no labels: use `rayclip retrieval`, or name the column of labels with "
                f"{option.format('label', 'COLUMN')}."
            )
        declared, *also_declared = [declared_names(file.schema_arrow, label) for file in files]
        for path, other, names in zip(paths[1:], others, also_declared, strict=True):
            if other != columns or names != declared:
                raise UserError(f"{path} names other classes or columns than {first}: give each file by itself.")
        values = [read_column(path, file, label) for path, file in zip(paths, files, strict=True)]
        if sum(map(len, values)) == 0:
            raise UserError(f"{first} holds no rows.")
        distinct = {value for column in values for value in column.unique().to_pylist()}
        counted_from_1 = prepare_command(name, paths, dataclasses.replace(reading, labels_from=1))
        self._labels = open_labels(
            str(first),
            columns,
            declared,
            distinct,
            reading,
            from_1=f"write {option.format('labels-from', 1)}, or prepare it with `{counted_from_1}`",
            names_option=f", or {option.format('names', 'FILE')}",
        )
        self.class_names = self._labels.class_names
        self.raw_names = self._labels.own_names or self.class_names
        # Equal names are allowed: ImageNet's curated list has two classes "missile" and two "sunglasses".
        if len(self.class_names) < 2:
            raise UserError(f"{first} must name at least two classes; it names {len(self.class_names)}.")
        numbers = self._labels.numbers(str(first), distinct)
        self.labels = np.concatenate([_numbered(column, numbers) for column in values])
        if missing := int((self.labels == MISSING).sum()):
            raise UserError(
                f"{first} has {missing:,} images without a label: set them aside with "
                f"`{prepare_command(name, paths, reading)}`."
            )
        self.labels -= reading.labels_from
        self.ids = np.arange(len(self.labels))
        rows = [file.metadata.num_rows for file in files]
        images = self.encoded = TableImages(rows, self.paths.__getitem__, columns.image, name)
        self.fingerprint = self._fingerprint(images.paths())
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        remedy = "" if reading.labels_from or columns.text_labels else f"write {option.format('labels-from', 1)}"
        notes = notes_on_classes(self.class_names, counts, remedy=remedy)
        self.notes = (*([self._labels.note] if self._labels.note else []), *notes)

    def _fingerprint(self, named: Sequence[Path]) -> str:
        """Hash the files' footers, the options for reading, and the image files that rows name."""
        gone = [path for path in named if not path.is_file()]
        if gone and len(gone) == len(self.labels):
            raise UserError(
                f"{self.paths[0]} holds no images, only paths of image files, and there is no {gone[0]}: put the files "
                "there, or write the images themselves into it."
            )
        decisive = {
            **self._reading.decisive(),
            **({"files": checksums(named)} if named else {}),
            **({"texts": self._labels.texts} if self._labels.texts else {}),
        }
        footers = footers_fingerprint(self.paths)
        return hashlib.sha256(f"{footers}{json.dumps(decisive)}".encode()).hexdigest()[:16] if decisive else footers


def _numbered(column: pa.ChunkedArray, numbers: dict[object, int]) -> np.ndarray:
    """Convert a column to labels, `(N,)` int64, counted as in the data; `MISSING` for rows without one."""
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy().astype(np.int64)
    return np.array([numbers.get(value, MISSING) for value in column.to_pylist()], dtype=np.int64)

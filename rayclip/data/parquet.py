"""The user's own Parquet files in the Hugging Face image-classification layout.

`image: struct<bytes, path>`, `label: int64`, class names under `huggingface` in the schema metadata; one file or
several shards. Other column names, label types and image types are read if the choice is unambiguous (`columns`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayclip.data.columns import class_numbers, declared_names, find_columns
from rayclip.data.encoded import EncodedImages, preparing
from rayclip.data.images import ImageSet
from rayclip.data.labels import MISSING, counted_from_1, explain_labels, notes_on_classes, with_given_names
from rayclip.data.rowgroups import RowGroups, checksums, footer, open_parquet, read_column
from rayclip.data.spec import Reading
from rayclip.types import UserError


class ParquetImages(EncodedImages, ImageSet):
    """Labelled images of one or several Parquet or Arrow files.

    Raises:
        UserError: a file is missing, damaged or not Parquet; has no images, labels or class names, or labels outside
            the class names; has other classes than the first file; or names only image files that do not exist.
    """

    def __init__(self, paths: Sequence[Path], name: str, reading: Reading = Reading()) -> None:
        self.name = name
        self.paths = tuple(paths)
        self._reading = reading
        files = [open_parquet(path) for path in paths]
        option = f"{paths[0]}#{{}}={{}}" if len(paths) == 1 else f"{paths[0].parent}#{{}}={{}}"
        columns = [
            find_columns(str(path), file.schema_arrow, reading, option=option)
            for path, file in zip(paths, files, strict=True)
        ]
        label = columns[0].label
        if label is None:
            raise UserError(
                f"{paths[0]} has captions and no labels: use `rayclip retrieval`, or name the column of labels with "
                f"{option.format('label', 'COLUMN')}."
            )
        declared = [declared_names(file.schema_arrow, label) for file in files]
        for path, other, names in zip(paths[1:], columns[1:], declared[1:], strict=True):
            if other != columns[0] or names != declared[0]:
                raise UserError(f"{path} names other classes or columns than {paths[0]}: give each file by itself.")
        values = [read_column(path, file, label) for path, file in zip(paths, files, strict=True)]
        if sum(map(len, values)) == 0:
            raise UserError(f"{paths[0]} holds no rows.")
        own = declared[0] or (_distinct_texts(values) if columns[0].text_labels and not reading.names else ())
        self.class_names, given_note = self._name_classes(own, option)
        self.raw_names = own or self.class_names
        texts = (own or self.class_names) if columns[0].text_labels else ()
        number_of = {text: number for number, text in enumerate(texts, start=reading.labels_from)}
        self.labels = np.concatenate(
            [class_numbers(str(path), label, v, number_of) for path, v in zip(paths, values, strict=True)]
        )
        self._check_labels(option)
        self.labels -= reading.labels_from
        self.ids = np.arange(len(self.labels))
        self.encoded = RowGroups([f.metadata.num_rows for f in files], self.paths.__getitem__, columns[0].image, name)
        named = self._named_files()
        self.fingerprint = footers_fingerprint(paths)
        decisive = {**reading.decisive(), **({"files": named} if named else {}), **({"texts": texts} if texts else {})}
        if decisive:
            self.fingerprint = hashlib.sha256(f"{self.fingerprint}{json.dumps(decisive)}".encode()).hexdigest()[:16]
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        remedy = "" if reading.labels_from or columns[0].text_labels else f"write {option.format('labels-from', 1)}"
        notes = notes_on_classes(self.class_names, counts, remedy=remedy)
        self.notes = (*([given_note] if given_note else []), *notes)

    def _name_classes(self, own: tuple[str, ...], option: str) -> tuple[tuple[str, ...], str | None]:
        given = self._reading.class_names()
        if given is not None:
            return with_given_names(own, given, str(self._reading.names))
        if not own:
            raise UserError(
                f"{self.paths[0]} names no classes: give --class-names FILE, a name a line in label order, or "
                f"{option.format('names', 'FILE')}; the datasets library writes them as a ClassLabel under the key "
                "'huggingface' of the schema metadata."
            )
        # Equal names are allowed: ImageNet's curated list has two classes "missile" and two "sunglasses".
        if len(own) < 2:
            raise UserError(f"{self.paths[0]} must name at least two classes; it names {len(own)}.")
        return own, None

    def _check_labels(self, option: str) -> None:
        """Raise a `UserError` unless every image has a label within the classes."""
        distinct, first = np.unique(self.labels).tolist(), self._reading.labels_from
        wrong = explain_labels(distinct, len(self.class_names), first)
        if wrong is not None:
            if counted_from_1(distinct, len(self.class_names), first):
                raise UserError(
                    f"{self.paths[0]} has {wrong}: write {option.format('labels-from', 1)}, or prepare it with "
                    f"`{preparing(self.name, self.paths, dataclasses.replace(self._reading, labels_from=1))}`."
                )
            raise UserError(
                f"{self.paths[0]} has {wrong}: name every class with --class-names FILE, a name a line in label order, "
                "or correct the labels."
            )
        missing = int((self.labels == MISSING).sum())
        if missing:
            raise UserError(
                f"{self.paths[0]} has {missing:,} images without a label: set them aside with "
                f"`{preparing(self.name, self.paths, self._reading)}`."
            )

    def _named_files(self) -> list[int]:
        """Return checksums of the image files that rows name, since they are part of the data's fingerprint."""
        assert isinstance(self.encoded, RowGroups)
        named = self.encoded.paths()
        gone = [path for path in named if not path.is_file()]
        if gone and len(gone) == len(self.labels):
            raise UserError(
                f"{self.paths[0]} holds no images, only paths of image files, and there is no {gone[0]}: put the files "
                "there, or write the images themselves into it."
            )
        return checksums(named)


def _distinct_texts(values: Sequence[Any]) -> tuple[str, ...]:
    """Return the distinct text labels, which serve as class names; sorted, like class folders."""
    return tuple(sorted({text for column in values for text in column.unique().to_pylist() if text is not None}))


def footers_fingerprint(paths: Sequence[Path]) -> str:
    """Hash the files' footers (row counts, offsets, sizes and statistics), without reading every image."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(footer(path))
    return digest.hexdigest()[:16]

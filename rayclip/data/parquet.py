"""The user's own Parquet files in the Hugging Face layout: images with labels, or with captions.

`image: struct<bytes, path>`, and `label: int64` with class names under `huggingface` in the schema metadata or
`captions: list<string>`; one file or several shards. Other column names, label types and image types are read if the
choice is unambiguous (`columns`).
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from rayclip.data.columns import Columns, caption_texts, check_alike, find_columns, open_labels
from rayclip.data.images import ImageSet, Resize
from rayclip.data.intake import BadImageError, check_image, decode, in_order
from rayclip.data.labels import MISSING, Reading, notes_on_classes
from rayclip.data.registry import DATASETS
from rayclip.data.tables import TableImages, checksums, fingerprint_of, open_table, read_column
from rayclip.store import Store, cache_root
from rayclip.types import UserError


class Encoded(Protocol):
    """Encoded image files by position: `TableImages` of the user's own files, `MappedImages` of prepared ones."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int, /) -> bytes | memoryview: ...


def prepare_command(name: str, paths: Sequence[Path], reading: Reading = Reading()) -> str:
    """Return the command that prepares a data set from the user's own files, setting unusable samples aside."""
    place = paths[0] if len(paths) == 1 else paths[0].parent
    command = f"rayclip data prepare {own_name(name)} --source parquet {shlex.quote(str(place.absolute()))}"
    options = {"image-column": reading.image, "label-column": reading.label, "class-names": reading.names}
    words = [f"--{option} {shlex.quote(value)}" for option, value in options.items() if value]
    words += [f"--labels-from {reading.labels_from}"] if reading.labels_from else []
    return " ".join([command, *words])


def own_name(name: str) -> str:
    """Derive a name for the user's own data set from its file name."""
    own = re.sub(r"[^\w-]+", "-", name).strip("-_") or "mine"
    if own in DATASETS or Path(own).exists():  # otherwise it would mean the published data set, or the path
        own += "-checked"
    return own


class EncodedImages:
    """Base of labelled images and image-caption pairs in files.

    Attributes:
        name, fingerprint, native_size: see `ImageSet`.
        encoded: the encoded images.
        paths: the user's own files; empty for a prepared data set, whose images have all been checked.
    """

    name: str
    fingerprint: str
    native_size: tuple[int, int] | None = None
    encoded: Encoded
    paths: tuple[Path, ...] = ()
    _reading: Reading = Reading()

    def _open(
        self, paths: Sequence[Path], name: str, reading: Reading, captions: bool = False, option: str = "--{}-column {}"
    ) -> tuple[Columns, list[pa.ChunkedArray], list[Path]]:
        """Return the columns of files that belong together, their labels or captions, and the image files named."""
        self.name, self.paths, self._reading = name, tuple(paths), reading
        files = [open_table(path) for path in paths]
        columns, *others = [
            find_columns(str(path), file.schema_arrow, reading, captions=captions, option=option)
            for path, file in zip(paths, files, strict=True)
        ]
        for path, other in zip(paths[1:], others, strict=True):
            check_alike(path, other, paths[0], columns)
        column = columns.label or str(columns.captions)
        values = [read_column(path, file, column) for path, file in zip(paths, files, strict=True)]
        if not sum(map(len, values)):
            raise UserError(f"{paths[0]} holds no rows.")
        images = self.encoded = TableImages(list(map(len, values)), self.paths.__getitem__, columns.image, name)
        return columns, values, images.paths()

    def _footers(self) -> str:
        return hashlib.sha256(b"".join(map(fingerprint_of, self.paths))).hexdigest()[:16]

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        """Return the RGB images at these positions (0..N-1), in this order."""
        return [self._decode(int(p)) for p in positions]

    def _decode(self, position: int) -> Image.Image:
        try:
            return decode(self.encoded[position])
        except BadImageError as error:
            raise UserError(f"row {position} of '{self.name}' is no readable image: {error}.") from error

    def check(self, on_progress: Callable[[int, int], None] = lambda done, total: None, *, again: bool = False) -> None:
        """See `ImageSet.check`. In files that were not prepared, every image is decoded once; the outcome is remembered
        until the files change, unless `again` is given."""
        if not self.paths:
            return
        stats = [path.stat() for path in self.paths]
        state = f"{self.fingerprint}{[(s.st_size, s.st_mtime_ns) for s in stats]}"
        memory = Store(str(cache_root() / "checked"))
        name = f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
        found = None if again else memory.read_json(name, dict)
        if found is None:
            found = self._check_all(on_progress)
            with contextlib.suppress(OSError):  # if the cache cannot be written, the check is only repeated
                memory.write_json(name, found)
        if found["bad"]:
            first, reason = found["bad"][0]
            raise UserError(
                f"{len(found['bad'])} of the {len(self.encoded)} images of '{self.name}' cannot be read (row {first}: "
                f"{reason}): set them aside with `{prepare_command(self.name, self.paths, self._reading)}`."
            )
        self.native_size = tuple(found["size"]) if found["size"] else None

    def _check_all(self, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        def fetch(position: int) -> bytes | BadImageError:
            try:
                return bytes(self.encoded[position])
            except BadImageError as error:
                return error

        def size_of(image: bytes | BadImageError) -> tuple[int, int] | str:
            try:
                return str(image) if isinstance(image, BadImageError) else check_image(image).size
            except BadImageError as error:
                return str(error)

        bad, sizes = [], set()
        outcomes = in_order(map(fetch, range(len(self.encoded))), size_of)
        for position, (_, outcome) in enumerate(outcomes):
            if isinstance(outcome, str):
                bad.append((position, outcome))
            else:
                sizes.add(outcome)
            on_progress(position + 1, len(self.encoded))
        return {"bad": bad, "size": sizes.pop() if len(sizes) == 1 else None}


class ParquetImages(EncodedImages, ImageSet):
    """Labelled images of one or several Parquet or Arrow files. Raises `UserError`: a file is missing, damaged or not
    Parquet; has no images, labels or class names, or labels outside the class names; has other classes than the first
    file; or names only image files that do not exist."""

    def __init__(self, paths: Sequence[Path], name: str, reading: Reading = Reading()) -> None:
        first = paths[0]
        option = f"{first if len(paths) == 1 else first.parent}#{{}}={{}}"
        columns, values, named = self._open(paths, name, reading, option=option)
        if columns.label is None:
            raise UserError(
                f"{first} has captions and no labels: use `rayclip retrieval`, or name the column of labels with "
                f"{option.format('label', 'COLUMN')}."
            )
        distinct = {value for column in values for value in column.unique().to_pylist()}
        counted_from_1 = prepare_command(name, paths, dataclasses.replace(reading, labels_from=1))
        labels = open_labels(
            str(first),
            columns,
            distinct,
            reading,
            from_1=f"write {option.format('labels-from', 1)}, or prepare it with `{counted_from_1}`",
            names_option=f", or {option.format('names', 'FILE')}",
        )
        self.class_names = labels.class_names
        self.raw_names = labels.own_names or self.class_names
        # Equal names are allowed: ImageNet's curated list has two classes "missile" and two "sunglasses".
        if len(self.class_names) < 2:
            raise UserError(f"{first} must name at least two classes; it names {len(self.class_names)}.")
        numbers = labels.numbers(str(first), distinct)
        self.labels = np.concatenate([_numbered(column, numbers) for column in values])
        if missing := int((self.labels == MISSING).sum()):
            raise UserError(
                f"{first} has {missing:,} images without a label: set them aside with "
                f"`{prepare_command(name, paths, reading)}`."
            )
        self.labels -= reading.labels_from
        self.ids = np.arange(len(self.labels))
        gone = [path for path in named if not path.is_file()]
        if gone and len(gone) == len(self.labels):
            raise UserError(
                f"{first} holds no images, only paths of image files, and there is no {gone[0]}: put the files "
                "there, or write the images themselves into it."
            )
        texts = {"texts": list(labels.number_of)} if labels.number_of else {}
        decisive = {**reading.decisive(), **({"files": checksums(named)} if named else {}), **texts}
        self.fingerprint = self._footers()
        if decisive:
            self.fingerprint = hashlib.sha256(f"{self.fingerprint}{json.dumps(decisive)}".encode()).hexdigest()[:16]
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        remedy = "" if reading.labels_from or columns.text_labels else f"write {option.format('labels-from', 1)}"
        self.notes = (*labels.notes, *notes_on_classes(self.class_names, counts, remedy=remedy))


def _numbered(column: pa.ChunkedArray, numbers: dict[object, int]) -> np.ndarray:
    """Convert a column to labels, `(N,)` int64, counted as in the data; `MISSING` for rows without one."""
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy().astype(np.int64)
    return np.array([numbers.get(value, MISSING) for value in column.to_pylist()], dtype=np.int64)


class PairSet(EncodedImages):
    """Images of one or several Parquet files, each with its captions; see `ImageSet`.

    Attributes:
        captions: the captions of each image, at least one, as in the file.
        ids: `(N,)` int64, each image's row in its source.
        fingerprint: a hash of the files' footers and every caption; of a prepared data set, the manifest's.

    Raises:
        UserError: a file is missing, not Parquet, or has no images; or an image has no captions.
    """

    resize: Resize = "crop"
    notes: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        _, values, named = self._open(paths, name, Reading(), captions=True)
        rows = []
        for path, column in zip(paths, values, strict=True):
            for position, value in enumerate(column.to_pylist()):
                rows.append(caption_texts(value))
                if not rows[-1]:
                    raise UserError(f"row {position} of {path} has no captions: drop the image or caption it.")
                if not all(caption.strip() for caption in rows[-1]):
                    raise UserError(f"row {position} of {path} has an empty caption: drop or write it.")
        self.captions: tuple[tuple[str, ...], ...] = tuple(rows)
        self.ids = np.arange(len(rows))
        decisive = [self._footers(), self.captions, *([checksums(named)] if named else [])]
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.captions)

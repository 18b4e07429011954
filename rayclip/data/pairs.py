"""Image-caption pairs for retrieval: Parquet with `image: struct<bytes, path>` and `captions: list<string>`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayclip.data.cache import local_path
from rayclip.data.columns import caption_texts, find_columns
from rayclip.data.encoded import EncodedImages
from rayclip.data.images import Resize
from rayclip.data.layout import WHOLE, find_files
from rayclip.data.manifest import MANIFEST
from rayclip.data.mapped import MappedImages
from rayclip.data.opening import choose_split, locate, open_manifest
from rayclip.data.prepared import read_index
from rayclip.data.spec import Reading, parse_spec
from rayclip.data.tables import TableImages, checksums, footers_fingerprint, open_table, read_column
from rayclip.paths import expand_home
from rayclip.store import Store
from rayclip.types import UserError

_LAYOUT = "(image: struct<bytes, path>, captions: list<string>)"


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
        self.name = name
        files = [open_table(path) for path in paths]
        columns = [
            find_columns(str(p), f.schema_arrow, Reading(), captions=True) for p, f in zip(paths, files, strict=True)
        ]
        if len(set(columns)) > 1:
            raise UserError(f"the files of {paths[0].parent} have different columns: give each by itself.")
        image, captions = columns[0].image, str(columns[0].captions)
        rows = [row for path, file in zip(paths, files, strict=True) for row in _captions(path, file, captions)]
        if not rows:
            raise UserError(f"{paths[0]} holds no rows.")
        self.captions: tuple[tuple[str, ...], ...] = tuple(rows)
        self.ids = np.arange(len(rows))
        self.paths = tuple(paths)
        rows_of = [file.metadata.num_rows for file in files]
        images = self.encoded = TableImages(rows_of, self.paths.__getitem__, image, name)
        named = checksums(images.paths())
        decisive = [footers_fingerprint(paths), self.captions, *([named] if named else [])]
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.captions)


def has_captions(path: str | Path) -> bool:
    """Return whether a Parquet file has a column of captions. Raises `UserError`."""
    return "captions" in open_table(Path(expand_home(str(path)))).schema_arrow.names


def open_pairs(spec: str, split: str | None = None) -> PairSet:
    """Open images with captions.

    Args:
        spec: a `.parquet` file, used whole; a folder with `test*.parquet`, or else `val*.parquet`; or the name, folder
            or URI of a prepared image-caption data set.
        split: split of a prepared data set; None for the evaluated one.

    Raises:
        UserError: no such data, or it holds no images with captions.
    """
    if not spec.strip():
        raise UserError(f"--data names nothing: give a .parquet file {_LAYOUT}, or a prepared data set's name.")
    parsed = parse_spec(spec)
    if parsed.part or parsed.reading != Reading():
        raise UserError(f"{spec}: image-caption data are given by their place alone: leave out what follows the #.")
    place = locate(parsed.place)
    if "://" not in place:
        path = Path(place)
        if path.is_file() or (path.suffix == ".parquet" and not path.is_dir()):
            return PairSet([path], path.stem)
        if not path.is_dir():
            raise UserError(
                f"no image-caption data '{spec}': give a .parquet file {_LAYOUT}, a folder with test*.parquet, or run "
                "`rayclip data prepare flickr8k` (or flickr30k, mscoco_captions) and give that name."
            )
        if not (path / MANIFEST).is_file():
            return _open_folder(path)
    store = Store(place)
    manifest = open_manifest(store)
    if manifest.kind != "captions":
        raise UserError(f"'{manifest.name}' has classes, not captions: use `rayclip eval`.")
    split = choose_split(manifest, split or "test")
    shards = manifest.splits[split].shards
    files = [local_path(store, shard) for shard in shards]
    pairs = PairSet(files, manifest.name)
    # A prepared data set was checked when it was prepared, and is identified by its content: no second check.
    pairs.paths, pairs.fingerprint = (), manifest.fingerprint(split)
    pairs.native_size, pairs.notes = manifest.splits[split].size, manifest.notes_on(split)
    pairs.encoded = MappedImages(
        [s.rows for s in shards], files.__getitem__, read_index(store, manifest, split), pairs.name
    )
    return pairs


def _open_folder(folder: Path) -> PairSet:
    found = find_files(folder)
    for split in ("test", "val", WHOLE):
        if split in found:
            return PairSet(found[split], folder.resolve().name)
    raise UserError(f"folder {folder} holds no test pairs: it needs test*.parquet or val*.parquet {_LAYOUT}.")


def _captions(path: Path, file: Any, column: str) -> list[tuple[str, ...]]:
    """Return the captions of each image. Raises `UserError` for an image without captions."""
    rows = [caption_texts(value) for value in read_column(path, file, column).to_pylist()]
    for position, row in enumerate(rows):
        if not row:
            raise UserError(f"row {position} of {path} has no captions: drop the image or caption it.")
        if not all(caption.strip() for caption in row):
            raise UserError(f"row {position} of {path} has an empty caption: drop or write it.")
    return rows

"""Prepared data sets: opening one reads only its manifest and labels; images are read on demand.

`prepare` writes image bytes uncompressed and records the offset of each image in its Parquet file, so that random
access to the memory-mapped file reads only the image's own bytes, not its row group.
"""

import bisect
import hashlib
import io
import itertools
import mmap
import os
import shlex
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock

from rayclip.data.images import ImageSet
from rayclip.data.manifest import SAVED, File, Manifest, Names
from rayclip.data.parquet import EncodedImages, PairSet
from rayclip.store import Store, cache_root
from rayclip.types import UserError

# One image: offset and size of its bytes in its Parquet file, their CRC-32, and its label (-1 for captions).
INDEX = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("label", "<i8")])


class PreparedImages(EncodedImages, ImageSet):
    """One split of a prepared data set, from a local folder or from this node's copy of a remote one. Raises
    `UserError` if the index does not match the manifest."""

    def __init__(self, store: Store, manifest: Manifest, split: str, names: Names = "curated") -> None:
        self.manifest, self.split, self._store = manifest, split, store
        self.name = manifest.name
        spelled = (manifest.class_names, manifest.raw_names)
        self.class_names, self.other_names = spelled if names == "curated" else spelled[::-1]
        self.raw_names = manifest.raw_names
        found = manifest.splits[split]
        self.shards, self.native_size = found.shards, found.size
        self.notes = manifest.notes_on(split)
        index = _read_index(store, manifest, split)
        self.labels = index["label"].astype(np.int64)
        self.ids = np.arange(len(self.labels))
        if manifest.source.get("kind") == SAVED:
            self.ids, self.resize = _saved_ids(store, manifest, split), manifest.source["resize"]
        self.fingerprint = manifest.fingerprint(split)
        self.encoded = MappedImages([s.rows for s in self.shards], self._locate, index, self.name)

    def _locate(self, number: int) -> Path:
        return local_path(self._store, self.shards[number])

    def archives(self) -> tuple[int, ...]:
        source = self.manifest.source
        if "webdataset" not in (source.get("kind"), source.get("form")):
            return ()
        system, place = self._store.filesystem()
        of_each: list[str] = []  # the archive begins the path of each image
        for shard in self.shards:
            with system.open_input_file(f"{place}/{shard.file}") as file:
                table = pq.ParquetFile(file).read(columns=["image.path"])
            paths = table["image"].combine_chunks().field("path").to_pylist()
            of_each += [path.partition(".tar/")[0] for path in paths]
        return tuple(len(list(members)) for _, members in itertools.groupby(of_each))


def prepared_pairs(store: Store, manifest: Manifest, split: str) -> PairSet:
    """Open image-caption pairs, which were checked when they were prepared and are identified by their content."""
    found = manifest.splits[split]
    files = [local_path(store, shard) for shard in found.shards]
    pairs = PairSet(files, manifest.name)
    pairs.paths, pairs.fingerprint = (), manifest.fingerprint(split)
    pairs.native_size, pairs.notes = found.size, manifest.notes_on(split)
    index = _read_index(store, manifest, split)
    pairs.encoded = MappedImages([s.rows for s in found.shards], files.__getitem__, index, pairs.name)
    return pairs


class MappedImages:
    """The encoded images of several Parquet files as one sequence; see `TableImages`. Processes of one node share the
    mapped pages.

    Args:
        rows: number of rows of each file.
        locate: returns the local path of file number i.
        index: `(N,)` of `INDEX`, the images of all files in order.
    """

    def __init__(self, rows: Sequence[int], locate: Callable[[int], Path], index: np.ndarray, name: str) -> None:
        self._starts = [0, *itertools.accumulate(rows)]
        self._locate, self._index, self._name = locate, index, name
        self._maps: dict[int, memoryview] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> memoryview:
        """Return an image's encoded bytes. Raises `UserError` if they do not match their checksum."""
        number = bisect.bisect_right(self._starts, position) - 1
        if number not in self._maps:
            with self._locate(number).open("rb") as file:
                self._maps[number] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        offset, size, crc, _ = self._index[position].item()
        data = self._maps[number][offset : offset + size]
        if zlib.crc32(data) != crc:
            raise UserError(
                f"image {position} of '{self._name}' is damaged on disk: `rayclip data verify {self._name}` tells "
                "more; prepare it again as before, with --force."
            )
        return data


def _read_index(store: Store, manifest: Manifest, split: str) -> np.ndarray:
    """Read a split's labels and image offsets, `(N,)` of `INDEX`."""
    found = manifest.splits[split]
    data = local_path(store, found.index).read_bytes()
    if hashlib.sha256(data).hexdigest() == found.index.sha256:
        index = np.load(io.BytesIO(data), allow_pickle=False)
        counts = np.bincount(index["label"], minlength=len(found.per_class)).tolist() if found.per_class else []
        if index.dtype == INDEX and len(index) == found.rows and counts == list(found.per_class):
            return index
    raise UserError(
        f"{store.root}: {found.index.file} does not match the manifest: prepare '{manifest.name}' again with --force."
    )


def ids_file(split: str) -> str:
    """Return the name of the file with the ids that saved samples have in the data set that they come from."""
    return f"ids-{split}.npy"


def _saved_ids(store: Store, manifest: Manifest, split: str) -> np.ndarray:
    data = store.read(ids_file(split)) or b""
    if hashlib.sha256(data).hexdigest() != manifest.source["ids"]:
        raise UserError(f"{store.root}: {ids_file(split)} does not match the manifest: save the images again.")
    return np.load(io.BytesIO(data), allow_pickle=False)


def local_path(store: Store, file: File) -> Path:
    """Return a local path at which a file of `store` can be memory-mapped: the file itself below a local root, else its
    copy on this node, which one process fetches while the others wait. Raises `UserError`: the file is missing or
    differs from the manifest, or the cache's disk is full."""
    if store.is_local:
        path = store.path(file.file)
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise UserError(
                f"{path} is missing or has another size than its manifest says: `rayclip data verify "
                f"{shlex.quote(store.name)} --root {shlex.quote(str(path.parent.parent))}` tells more; prepare it "
                "again as before, with --force."
            )
        return path
    copy = cache_root() / file.sha256[:2] / f"{file.sha256}{Path(file.file).suffix}"
    if copy.is_file():
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.is_file():
                _fetch(store, file, copy)
    except OSError as error:
        raise UserError(
            f"{store.root}: {file.file} cannot be copied to {cache_root()} ({str(error).splitlines()[0]}): check the "
            "address, or set RAYCLIP_CACHE to a disk with room."
        ) from error
    return copy


def _fetch(store: Store, file: File, copy: Path) -> None:
    aside = copy.with_name(f"{copy.name}.{uuid.uuid4().hex[:8]}.partial")
    digest = hashlib.sha256()
    try:
        with aside.open("wb") as target:
            for chunk in store.chunks(file.file):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise UserError(
                f"{store.root}: {file.file} is not what its manifest says (other content): `rayclip data verify` "
                "tells more."
            )
        os.replace(aside, copy)
    finally:
        aside.unlink(missing_ok=True)

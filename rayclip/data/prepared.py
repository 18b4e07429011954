"""Prepared data sets: opening one reads only its manifest and labels; images are read on demand."""

import hashlib
import io
from pathlib import Path

import numpy as np

from rayclip.data.cache import local_path
from rayclip.data.encoded import EncodedImages
from rayclip.data.images import ImageSet
from rayclip.data.manifest import Manifest, Names
from rayclip.data.mapped import INDEX, MappedImages
from rayclip.store import Store
from rayclip.types import UserError


class PreparedImages(EncodedImages, ImageSet):
    """One split of a prepared data set, from a local folder or from this node's copy of a remote one. Raises
    `UserError` if the index does not match the manifest."""

    def __init__(self, store: Store, manifest: Manifest, split: str, names: Names = "curated") -> None:
        self.manifest, self.split, self._store = manifest, split, store
        self.name = manifest.name
        self.class_names, self.raw_names = manifest.names(names), manifest.raw_names
        found = manifest.splits[split]
        self.shards, self.native_size = found.shards, found.size
        self.notes = manifest.notes_on(split)
        index = read_index(store, manifest, split)
        self.labels = index["label"].astype(np.int64)
        self.ids = np.arange(len(self.labels))
        self.fingerprint = manifest.fingerprint(split)
        self.encoded = MappedImages([s.rows for s in self.shards], self._locate, index, self.name)

    def _locate(self, number: int) -> Path:
        return local_path(self._store, self.shards[number])


def read_index(store: Store, manifest: Manifest, split: str) -> np.ndarray:
    """Read a split's labels and image offsets, `(N,)` of `mapped.INDEX`. Raises `UserError` if they do not match the
    manifest."""
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

"""A prepared data set: opened by its manifest and labels alone; images come when they are asked for."""

import hashlib
import io
from pathlib import Path

import numpy as np

from rayclip.data.cache import local_path
from rayclip.data.encoded import EncodedImages
from rayclip.data.images import ImageSet
from rayclip.data.manifest import Manifest, Names
from rayclip.data.rowgroups import RowGroups
from rayclip.store import Store
from rayclip.types import UserError


class PreparedImages(EncodedImages, ImageSet):
    """One split of a prepared data set, from a local folder or through this node's copy of a remote one.

    Args:
        store: the folder of the data set.
        split: by its name in the manifest.
        names: spelling of the classes.

    Raises:
        UserError: the labels are not those of the manifest.
    """

    def __init__(self, store: Store, manifest: Manifest, split: str, names: Names = "curated") -> None:
        self.manifest, self.split, self._store = manifest, split, store
        self.name = manifest.name
        self.class_names, self.raw_names = manifest.names(names), manifest.raw_names
        found = manifest.splits[split]
        self.shards, self.native_size = found.shards, found.size
        self.notes = manifest.notes_on(split)
        assert found.labels is not None  # the manifest's reader holds classification to it
        data = local_path(store, found.labels).read_bytes()
        try:
            if hashlib.sha256(data).hexdigest() != found.labels.sha256:
                raise ValueError("other content")
            self.labels = np.load(io.BytesIO(data), allow_pickle=False)
            counts = np.bincount(self.labels, minlength=len(found.per_class)).tolist()
        except (ValueError, TypeError, OSError, EOFError):
            counts = []
        if counts != list(found.per_class):
            raise UserError(
                f"{store.root}: {found.labels.file} does not match the manifest: prepare '{self.name}' again with "
                "--force."
            )
        self.ids = np.arange(len(self.labels))
        self.fingerprint = manifest.fingerprint(split)
        self.encoded = RowGroups([s.rows for s in self.shards], self._locate, "image", self.name)

    def _locate(self, number: int) -> Path:
        return local_path(self._store, self.shards[number])

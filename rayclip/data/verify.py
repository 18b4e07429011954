"""Verify a prepared data set against its manifest, reading every byte."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq

from rayclip.data.columns import declared_names
from rayclip.data.manifest import File, Manifest, Split, open_manifest
from rayclip.data.prepare import REJECTED
from rayclip.data.tables import UNREADABLE, first_line
from rayclip.store import Store
from rayclip.types import UserError

OnBytes = Callable[[int, int], None]  # bytes read, bytes in all


def verify(store: Store, on_progress: OnBytes = lambda done, total: None) -> tuple[Manifest, list[str]]:
    """Hash every file and count every row again. Returns the manifest, and a list of mismatches, one sentence each.
    Raises `UserError` if there is no manifest, or it is damaged."""
    manifest = open_manifest(store)
    problems: list[str] = []
    files = [f for split in manifest.splits.values() for f in split.files]
    done, total = 0, sum(f.bytes for f in files)
    sound: set[str] = set()
    for file in files:
        found = _hash(store, file, lambda n, before=done: on_progress(before + n, total))  # type: ignore[misc]
        problems += found
        sound |= set() if found else {file.file}
        done += file.bytes
    for name, split in manifest.splits.items():
        if all(f.file in sound for f in split.files):
            problems += _recount(store, manifest, name, split)
    problems += _rejected(store, manifest)
    known = {f.file for f in files} | {REJECTED}
    shard = re.compile(rf"(?:{'|'.join(map(re.escape, manifest.splits))})-\d+\.parquet")
    problems += [
        f"{name} is not in the manifest, but other programs would read it."
        for name in store.names("", ".parquet")
        if name not in known and shard.fullmatch(name)
    ]
    return manifest, problems


def _hash(store: Store, file: File, on_bytes: Callable[[int], None]) -> list[str]:
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in store.chunks(file.file):
            digest.update(chunk)
            size += len(chunk)
            on_bytes(size)
    except FileNotFoundError:
        return [f"{file.file} is missing."]
    except OSError as error:
        return [f"{file.file} cannot be read ({str(error).splitlines()[0]})."]
    if size != file.bytes:
        return [f"{file.file} has {size:,} bytes; the manifest says {file.bytes:,}."]
    if digest.hexdigest() != file.sha256:
        return [f"{file.file} has other content than the manifest says."]
    return []


def _recount(store: Store, manifest: Manifest, name: str, split: Split) -> list[str]:
    """Compare rows, labels and class names of the Parquet files with the manifest and the index."""
    values: list[np.ndarray] = []
    for shard in split.shards:
        try:
            with store.open(shard.file) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
                if file.metadata.num_rows != shard.rows:
                    return [f"{shard.file} has {file.metadata.num_rows:,} rows; the manifest says {shard.rows:,}."]
                if manifest.class_names:
                    if declared_names(file.schema_arrow, "label") != manifest.class_names:
                        return [f"{shard.file} names other classes than the manifest."]
                    values.append(file.read(columns=["label"])["label"].to_numpy())
        except (*UNREADABLE, KeyError, UserError) as error:
            return [f"{shard.file} cannot be read ({first_line(error)})."]
    index = np.load(io.BytesIO(store.read(split.index.file) or b""), allow_pickle=False)
    if len(index) != split.rows:
        return [f"{split.index.file} lists {len(index):,} images; the manifest says {split.rows:,}."]
    if not manifest.class_names:
        return []
    labels = np.concatenate(values)
    if not np.array_equal(labels, index["label"]):
        return [f"{split.index.file} lists other labels than the {name} shards hold."]
    if np.bincount(labels, minlength=len(manifest.class_names)).tolist() != list(split.per_class):
        return [f"the {name} shards hold other numbers of images per class than the manifest says."]
    return []


def _rejected(store: Store, manifest: Manifest) -> list[str]:
    expected = {name: s.rejected for name, s in manifest.splits.items() if s.rejected}
    try:
        table = store.read_tables([REJECTED] if store.size(REJECTED) is not None else [], columns=["split"])
        listed = Counter([] if table is None else table["split"].to_pylist())
    except (UserError, KeyError, ValueError):
        return [f"{REJECTED} is damaged."]
    if dict(listed) != expected:
        return [f"{REJECTED} lists {sum(listed.values()):,} images; the manifest says {sum(expected.values()):,}."]
    return []

"""Source of the data sets that torchvision reads, in the form their authors publish.

torchvision decodes every image it returns. Here its classes are used only to list the files and their labels; the
files' own bytes are passed on. The attributes used for that are the same in torchvision 0.21 to 0.29, the older of
which have no `loader=`. CIFAR, STL-10 and PCAM hold arrays, which are encoded as PNG record by record.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rayclip.data.registry import DatasetInfo, Torchvision
from rayclip.data.sources.base import Entry, FileSource, Record, describe_files, digest
from rayclip.types import UserError


@dataclass(frozen=True)
class _Arrays:
    """The records of a split stored as pixels: `read(i)` returns an (H, W, 3) uint8 array."""

    split: str
    labels: Sequence[int]
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Record:
        return Record(path=f"{self.split}/{i}.png", read=partial(self._png, i), label=int(self.labels[i]))

    def _png(self, i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.read(i))).save(buffer, "png")
        return buffer.getvalue()


class TorchvisionSource(FileSource):
    """A data set of `torchvision.datasets` in the folder that is torchvision's `root`, downloaded there if `download`.
    Without `splits`, all of them; without `download`, those that exist. Raises `UserError`: torchvision has no such
    data set or split, does not find the files it needs in the folder or cannot download them, or the splits name
    different classes."""

    def __init__(self, info: DatasetInfo, folder: Path, download: bool, splits: Sequence[str] | None = None) -> None:
        instead = "take --source hub or --source folder" if info.hub is not None else "take --source folder"
        if info.torchvision is None:
            raise UserError(f"torchvision has no data set '{info.name}': {instead}.")
        cls = info.torchvision.cls
        names: dict[str, tuple[str, ...]] = {}
        missing: dict[str, UserError] = {}
        entries: dict[str, Any] = {}
        described: dict[str, Any] = {}
        keys: Sequence[str] = ()
        for split in splits if splits is not None else info.torchvision.splits:
            try:
                dataset = _open(info, info.torchvision, folder, split, download, instead)
            except UserError as error:
                if splits is not None or download:
                    raise
                missing[split] = error
                continue
            names[split] = _class_names(dataset, info)
            found = entries[split] = _list(dataset, cls, folder, split, len(names[split]))
            if isinstance(found, _Arrays):  # torchvision verifies CIFAR and STL-10 against the published checksums
                described[split] = {"records": len(found), "digest": digest(map(str, found.labels))}
            else:
                described[split] = describe_files(folder, found)
            keys = getattr(dataset, "wnids", ())
        if not entries:
            raise missing[info.evaluated]
        if len(set(names.values())) > 1:
            raise UserError(
                f"the splits of {info.title} in {folder} name different classes: some files are missing; take the "
                f"complete data set, or {instead}."
            )
        description = {"kind": "torchvision", "class": cls, "splits": described}
        notes = [f"There is no {split} split in the folder." for split in missing]
        super().__init__(folder, entries, description, next(iter(names.values())), keys, notes)

    def _record(self, entry: Entry | Record) -> Record:
        return entry if isinstance(entry, Record) else super()._record(entry)


def _list(dataset: Any, cls: str, folder: Path, split: str, classes: int) -> Sequence[Entry] | _Arrays:
    if cls == "PCAM":
        return _pcam(folder / "pcam", split)
    if cls.startswith("CIFAR"):
        return _Arrays(split, dataset.targets, dataset.data.__getitem__)
    if cls == "STL10":
        return _Arrays(split, dataset.labels.tolist(), lambda i: dataset.data[i].transpose(1, 2, 0))
    entries = [
        Entry(
            Path(path).relative_to(folder).as_posix(),
            int(label),
            None if 0 <= label < classes else f"label {label} is outside 0 .. {classes - 1}",
        )
        for path, label in _files(dataset)
    ]
    # SUN397 is listed in the file system's order, which differs between nodes.
    return sorted(entries) if cls == "SUN397" else entries


def _open(info: DatasetInfo, known: Torchvision, folder: Path, split: str, download: bool, instead: str) -> Any:
    """Create torchvision's data set object. Any error inside torchvision becomes a `UserError` of one sentence."""
    import torchvision.datasets

    if split not in known.splits:
        raise UserError(f"torchvision's {info.title} has no split '{split}': it has {', '.join(known.splits)}.")
    if not download and not folder.is_dir():  # some classes would create the folder
        raise UserError(f"there is no folder {folder}: {info.title} needs {known.needs} in it; {instead}.")
    arguments = dict(known.splits[split])
    if download and known.download:
        arguments["download"] = True
    try:
        return getattr(torchvision.datasets, known.cls)(str(folder), **arguments)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        can = "could not fetch" if download and known.download else "finds no complete"
        raise UserError(
            f"torchvision {can} {info.title} ({split}) in {folder}, where it needs {known.needs} ({reason}): {instead}."
        ) from error


def _files(dataset: Any) -> Iterable[tuple[str | Path, int]]:
    """Return path and label of each image, in torchvision's order."""
    cls = type(dataset).__name__
    if cls in ("Caltech101", "Caltech256"):
        first = cls == "Caltech101"
        top = Path(dataset.root) / ("101_ObjectCategories" if first else "256_ObjectCategories")
        stem = "image_{1:04d}" if first else "{0:03d}_{1:04d}"
        return [
            (top / dataset.categories[label] / f"{stem.format(label + 1, number)}.jpg", label)
            for label, number in zip(dataset.y, dataset.index, strict=True)
        ]
    for pairs in ("samples", "_samples"):
        if hasattr(dataset, pairs):
            return getattr(dataset, pairs)
    images = "_images" if cls == "OxfordIIITPet" else "_image_files"
    return zip(getattr(dataset, images), dataset._labels, strict=True)


def _class_names(dataset: Any, info: DatasetInfo) -> tuple[str, ...]:
    """Return the class names in torchvision's spelling; ImageNet's synonyms are joined as in the devkit."""
    if hasattr(dataset, "categories"):
        return tuple(dataset.categories)
    if hasattr(dataset, "classes"):
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in dataset.classes)
    if info.name == "pcam":
        return ("no tumor tissue", "tumor tissue")
    if info.name == "flowers102":  # torchvision 0.21 has no names for it
        return tuple(str(number) for number in range(1, info.classes + 1))
    raise UserError(f"{info.title} names no classes: class_names.txt is missing; take the complete data set.")


def _pcam(folder: Path, split: str) -> _Arrays:
    """Open the published HDF5 files: `x` (N, 96, 96, 3) uint8, `y` (N, 1, 1, 1). Images are read on demand."""
    import h5py  # type: ignore[import-untyped]

    stem = f"camelyonpatch_level_2_split_{'valid' if split == 'val' else split}"
    images = folder / f"{stem}_x.h5"
    try:
        with h5py.File(folder / f"{stem}_y.h5") as file:
            labels = file["y"][:].reshape(-1).tolist()
        with h5py.File(images) as file:
            count = file["x"].shape[0]
    except (OSError, KeyError) as error:
        raise UserError(f"{folder}/{stem}_x.h5 or _y.h5 is not readable: fetch both again.") from error
    if count != len(labels):
        raise UserError(f"{images} holds {count} images but {stem}_y.h5 {len(labels)} labels: fetch both again.")

    def read(i: int) -> np.ndarray:
        with h5py.File(images) as file:
            return np.asarray(file["x"][i])

    return _Arrays(split, labels, read)

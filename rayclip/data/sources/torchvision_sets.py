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
from rayclip.data.sources.base import Record
from rayclip.data.sources.files import Entry, FileSource, digest
from rayclip.types import UserError


@dataclass(frozen=True)
class _Arrays:
    """A split stored as pixels: `read(i)` returns an (H, W, 3) uint8 array."""

    labels: Sequence[int]
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def png(self, i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.read(i))).save(buffer, "png")
        return buffer.getvalue()


class TorchvisionSource(FileSource):
    """A data set of `torchvision.datasets` in the folder that is torchvision's `root`, downloaded there if `download`.
    Without `splits`, all of them; without `download`, those that exist.

    Raises:
        UserError: torchvision has no such data set or split, does not find the files it needs in the folder or cannot
            download them, or the splits name different classes.
    """

    def __init__(self, info: DatasetInfo, folder: Path, download: bool, splits: Sequence[str] | None = None) -> None:
        instead = "take --source hub or --source folder" if info.hub is not None else "take --source folder"
        if info.torchvision is None:
            raise UserError(f"torchvision does not have {info.title}: {instead}.")
        super().__init__(folder.expanduser(), {})
        self._class = info.torchvision.cls
        names: dict[str, tuple[str, ...]] = {}
        missing: dict[str, UserError] = {}
        for split in splits if splits is not None else info.torchvision.splits:
            try:
                dataset = _open(info, info.torchvision, self._root, split, download, instead)
            except UserError as error:
                if splits is not None or download:
                    raise
                missing[split] = error
                continue
            names[split] = _class_names(dataset, info)
            self._entries[split] = self._list(dataset, split, len(names[split]))
            self.label_keys = tuple(getattr(dataset, "wnids", ()))
        if not self._entries:
            raise missing[info.evaluated]
        if len(set(names.values())) > 1:
            raise UserError(
                f"the splits of {info.title} in {self._root} name different classes: some files are missing; take the "
                f"complete data set, or {instead}."
            )
        self.class_names = next(iter(names.values()))
        self.notes = tuple(f"There is no {split} split in the folder." for split in missing)

    def describe(self) -> dict[str, Any]:
        splits = {}
        for split, content in self._entries.items():
            if isinstance(content, _Arrays):  # torchvision verifies CIFAR and STL-10 against the published checksums
                splits[split] = {"records": len(content), "digest": digest(map(str, content.labels))}
            else:
                splits[split] = self._describe_split(split)
        return {"kind": "torchvision", "class": self._class, "splits": splits}

    def _record(self, split: str, i: int) -> Record:
        content = self._entries[split]
        if isinstance(content, _Arrays):
            return Record(path=f"{split}/{i}.png", read=partial(content.png, i), label=int(content.labels[i]))
        return super()._record(split, i)

    def _list(self, dataset: Any, split: str, classes: int) -> Sequence[Entry] | _Arrays:
        if self._class == "PCAM":
            return _pcam(self._root / "pcam", split)
        if self._class.startswith("CIFAR"):
            return _Arrays(dataset.targets, dataset.data.__getitem__)
        if self._class == "STL10":
            return _Arrays(dataset.labels.tolist(), lambda i: dataset.data[i].transpose(1, 2, 0))
        entries = [
            Entry(
                Path(path).relative_to(self._root).as_posix(),
                int(label),
                None if 0 <= label < classes else f"label {label} is outside 0 .. {classes - 1}",
            )
            for path, label in _files(dataset)
        ]
        # SUN397 is listed in the file system's order, which differs between nodes.
        return sorted(entries) if self._class == "SUN397" else entries


def _open(info: DatasetInfo, known: Torchvision, folder: Path, split: str, download: bool, instead: str) -> Any:
    """Create torchvision's data set object. Any error inside torchvision becomes a `UserError` of one sentence."""
    import torchvision.datasets  # type: ignore[import-untyped]

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
    """Return the class names in label order, in torchvision's spelling; ImageNet's synonyms are joined as in the
    devkit."""
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

    return _Arrays(labels, read)

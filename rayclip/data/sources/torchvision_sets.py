"""Source of the data sets that torchvision reads, in the form their authors publish.

torchvision decodes every image it returns. Here its classes are used only to list the files and their labels; the
files' own bytes are passed on. The attributes used for that are the same in torchvision 0.21 to 0.29, the older of
which have no `loader=`. CIFAR, STL-10 and PCAM hold arrays, which are encoded as PNG record by record.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rayclip.data.registry import Row
from rayclip.data.sources.base import Record, Source
from rayclip.data.sources.listing import Entry, digest, file_records, listing_digest
from rayclip.types import UserError


class _Arrays(NamedTuple):
    """A split stored as pixels: `read(i)` returns an (H, W, 3) uint8 array."""

    labels: Sequence[int]
    read: Callable[[int], np.ndarray]


class TorchvisionSource(Source):
    """A data set of `torchvision.datasets`.

    Args:
        row: the data set.
        folder: torchvision's `root`.
        download: whether to download missing files, if torchvision can.
        splits: which of the row's splits to open. By default all; without `download`, those that exist.

    Raises:
        UserError: torchvision has no such data set or split, does not find the files it needs in the folder or cannot
            download them, or the splits name different classes.
    """

    def __init__(self, row: Row, folder: Path, download: bool, splits: Sequence[str] | None = None) -> None:
        if row.torchvision is None:
            raise UserError(f"torchvision does not have {row.title}: {_way_out(row)}.")
        self._row, self._torchvision, self._folder = row, row.torchvision, folder.expanduser()
        self._splits: dict[str, list[Entry] | _Arrays] = {}
        names: dict[str, tuple[str, ...]] = {}
        missing: dict[str, UserError] = {}
        for split in splits if splits is not None else self._torchvision.splits:
            try:
                dataset = self._dataset(split, download)
            except UserError as error:
                if splits is not None or download:
                    raise
                missing[split] = error
                continue
            self._splits[split] = self._content(dataset, split)
            names[split] = _class_names(dataset, row)
            self.label_keys = tuple(getattr(dataset, "wnids", ()))
        if not self._splits:
            raise missing[row.evaluated]
        if len(set(names.values())) > 1:
            raise UserError(
                f"the splits of {row.title} in {self._folder} name different classes: some files are missing; take the "
                f"complete data set, or {_way_out(row)}."
            )
        self.class_names = next(iter(names.values()))
        self.notes = tuple(f"There is no {split} split in the folder." for split in missing)

    def describe(self) -> dict[str, Any]:
        splits = {}
        for split, content in self._splits.items():
            if isinstance(content, _Arrays):  # torchvision verifies CIFAR and STL-10 against the published checksums
                mark = digest(map(str, content.labels))
            else:
                mark = listing_digest(self._folder, content)
            splits[split] = {"records": self.splits()[split], "digest": mark}
        return {"kind": "torchvision", "class": self._torchvision.cls, "splits": splits}

    def splits(self) -> dict[str, int | None]:
        return {s: len(c.labels) if isinstance(c, _Arrays) else len(c) for s, c in self._splits.items()}

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        if split not in self._splits:
            raise UserError(f"{self._row.title} has no split '{split}' here: it has {', '.join(self._splits)}.")
        content = self._splits[split]
        if isinstance(content, _Arrays):
            return _array_records(content, split, start)
        return file_records(self._folder, content, start)

    def _dataset(self, split: str, download: bool) -> Any:
        """Create torchvision's data set object. Any error inside torchvision becomes a `UserError` of one sentence."""
        import torchvision.datasets  # type: ignore[import-untyped]

        row, known = self._row, self._torchvision
        if split not in known.splits:
            raise UserError(f"torchvision's {row.title} has no split '{split}': it has {', '.join(known.splits)}.")
        if not download and not self._folder.is_dir():  # some classes would create the folder
            raise UserError(
                f"there is no folder {self._folder}: {row.title} needs {known.needs} in it; {_way_out(row)}."
            )
        arguments = dict(known.splits[split])
        if download and known.download:
            arguments["download"] = True
        try:
            return getattr(torchvision.datasets, known.cls)(str(self._folder), **arguments)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
            can = "could not fetch" if download and known.download else "finds no complete"
            raise UserError(
                f"torchvision {can} {row.title} ({split}) in {self._folder}, where it needs {known.needs} ({reason}): "
                f"{_way_out(row)}."
            ) from error

    def _content(self, dataset: Any, split: str) -> list[Entry] | _Arrays:
        if self._torchvision.cls == "PCAM":
            return _pcam(self._folder / "pcam", split)
        if self._torchvision.cls.startswith("CIFAR"):
            return _Arrays(dataset.targets, dataset.data.__getitem__)
        if self._torchvision.cls == "STL10":
            return _Arrays(dataset.labels.tolist(), lambda i: dataset.data[i].transpose(1, 2, 0))
        classes = len(_class_names(dataset, self._row))
        entries = [
            Entry(
                Path(path).relative_to(self._folder).as_posix(),
                label,
                None if 0 <= label < classes else f"label {label} is outside 0 .. {classes - 1}",
            )
            for path, label in ((path, int(label)) for path, label in _files(dataset))
        ]
        # SUN397 is listed in the file system's order, which differs between nodes.
        return sorted(entries) if self._torchvision.cls == "SUN397" else entries


def _files(dataset: Any) -> Iterator[tuple[str | Path, int]]:
    """Yield path and label of each image, in torchvision's order."""
    match type(dataset).__name__:
        case "Caltech101" | "Caltech256" as cls:
            top = Path(dataset.root) / ("101_ObjectCategories" if cls == "Caltech101" else "256_ObjectCategories")
            for label, number in zip(dataset.y, dataset.index, strict=True):
                stem = f"image_{number:04d}" if cls == "Caltech101" else f"{label + 1:03d}_{number:04d}"
                yield top / dataset.categories[label] / f"{stem}.jpg", label
        case "OxfordIIITPet":
            yield from zip(dataset._images, dataset._labels, strict=True)
        case "StanfordCars":
            yield from dataset._samples
        case "ImageNet" | "Country211" | "EuroSAT":
            yield from dataset.samples
        case _:
            yield from zip(dataset._image_files, dataset._labels, strict=True)


def _class_names(dataset: Any, row: Row) -> tuple[str, ...]:
    """Return the class names in label order, in torchvision's spelling; ImageNet's synonyms are joined as in the
    devkit."""
    if hasattr(dataset, "categories"):
        return tuple(dataset.categories)
    if hasattr(dataset, "classes"):
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in dataset.classes)
    if row.name == "pcam":
        return ("no tumor tissue", "tumor tissue")
    if row.name == "flowers102":  # torchvision 0.21 has no names for it
        return tuple(str(number) for number in range(1, row.classes + 1))
    raise UserError(f"{row.title} names no classes: class_names.txt is missing; take the complete data set.")


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


def _array_records(arrays: _Arrays, split: str, start: int) -> Iterator[Record]:
    def png(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(arrays.read(i))).save(buffer, "png")
        return buffer.getvalue()

    for i in range(start, len(arrays.labels)):
        yield Record(path=f"{split}/{i}.png", read=lambda i=i: png(i), label=int(arrays.labels[i]))  # type: ignore[misc]


def _way_out(row: Row) -> str:
    others = [f"--source {name}" for name, there in (("hub", row.hub), ("folder", True)) if there]
    return f"take {' or '.join(others)}"

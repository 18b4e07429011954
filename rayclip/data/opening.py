"""Data sets by name. `--data` takes a name of this registry or the path of any Parquet in the Hugging Face layout."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from rayclip.data.digits import Digits
from rayclip.data.images import ImageSet
from rayclip.data.parquet import ParquetImages
from rayclip.types import UserError

Split = Literal["train", "test"]

# MMCoA's 15 data sets, in the columns' order of its tables II and III.
MMCOA_15 = (
    "imagenet",
    "cifar10",
    "cifar100",
    "tiny_imagenet",
    "stl10",
    "sun397",
    "food101",
    "oxford_pets",
    "flowers102",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "country211",
    "caltech101",
    "caltech256",
)
PREPARED = frozenset({*MMCOA_15, "stanford_cars", "pcam"})

_FILES = {"train": ("train",), "test": ("test", "val", "validation")}  # ImageNet's labelled test images are its val


def data_root() -> Path:
    """Where prepared data sets live: `RAYCLIP_DATA`, or `~/.cache/rayclip/data`."""
    return Path(os.environ.get("RAYCLIP_DATA", "~/.cache/rayclip/data")).expanduser()


def open_data(spec: str, split: Split) -> ImageSet:
    """Open a data set.

    Args:
        spec: `digits`; a prepared data set's name; a `.parquet` file, taken whole; `FILE.parquet#holdout`, of which
            every fifth image of each class is the test split; or a folder with `train*.parquet` and `test*.parquet`
            (or `val*`, `validation*`).
        split: which part, where the source has parts.

    Raises:
        UserError: unknown name, missing file, or a Parquet that is not labelled images.
    """
    if spec == "digits":
        return Digits(split)
    path_text, holdout, _ = spec.partition("#holdout")
    path = Path(path_text)
    if path.is_file() or path.suffix == ".parquet":
        whole = ParquetImages([path], path.stem)
        return _held_out(whole, split) if holdout else whole
    if path.is_dir():
        return _open_folder(path, path.resolve().name, split)
    if spec in PREPARED:
        folder = data_root() / spec
        if not folder.is_dir():
            raise UserError(
                f"data set '{spec}' is not prepared: put its Parquet files (Hugging Face layout: "
                f"{split}*.parquet with image, label and class names) into {folder}, or set RAYCLIP_DATA "
                "to the folder that holds them."
            )
        return _open_folder(folder, spec, split)
    raise UserError(
        f"no data set or file '{spec}': give a .parquet file, a folder of them, or one of digits, "
        f"{', '.join(sorted(PREPARED))}."
    )


def _open_folder(folder: Path, name: str, split: Split) -> ImageSet:
    files = sorted(f for prefix in _FILES[split] for f in folder.glob(f"{prefix}*.parquet"))
    if not files:
        wanted = " or ".join(f"{prefix}*.parquet" for prefix in _FILES[split])
        raise UserError(f"folder {folder} holds no {split} images: it needs {wanted} in the Hugging Face layout.")
    return ParquetImages(files, name)


def _held_out(whole: ImageSet, split: Split) -> ImageSet:
    """Every fifth image of each class is the test split, in the file's order: fixed, without a seed."""
    rank = np.zeros(len(whole), dtype=np.int64)
    for label in np.unique(whole.labels):
        members = whole.labels == label
        rank[members] = np.arange(members.sum())
    part = whole.subset(np.flatnonzero((rank % 5 == 4) == (split == "test")))
    part.fingerprint = f"{whole.fingerprint}-{split}"  # other samples than the whole file's: never the same cell
    return part

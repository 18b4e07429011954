"""Data sets as people name them on the command line."""

import os
from pathlib import Path

import numpy as np

from rayclip.data.digits import Digits
from rayclip.data.images import ImageSet
from rayclip.data.manifest import MANIFEST, Manifest, Names, read_manifest
from rayclip.data.parquet import ParquetImages
from rayclip.data.prepared import PreparedImages
from rayclip.data.registry import CLASSIFIED, ROWS
from rayclip.store import Store
from rayclip.types import UserError

HOLDOUT = "#holdout"
VALIDATION = "#validation"
_FILES = {"train": ("train",), "test": ("test", "val", "validation")}  # of folders without a manifest


def data_root() -> str:
    """Where prepared data sets live: `RAYCLIP_DATA` (a folder or an object-store URI), or `~/.cache/rayclip/data`."""
    return os.environ.get("RAYCLIP_DATA") or str(Path("~/.cache/rayclip/data").expanduser())


def locate(spec: str) -> str:
    """A prepared data set's name with its root before it, since workers may have another environment."""
    name = spec.removesuffix(VALIDATION).partition(HOLDOUT)[0]
    if name in ("", "digits") or "/" in name or name.endswith(".parquet") or Path(name).exists():
        return spec
    folder = Store(data_root()).child(name)
    there = name in ROWS or (folder.path("").is_dir() if folder.is_local else folder.size(MANIFEST) is not None)
    return folder.root + spec[len(name) :] if there else spec


def open_data(spec: str, role: str, names: Names = "curated") -> ImageSet:
    """Open a data set.

    Args:
        spec: `digits`; a prepared data set's name, folder or URI; a `.parquet` file, taken whole; or a folder with
            `train*.parquet` and `test*.parquet` (or `val*`, `validation*`). With `#holdout` after it, every fifth
            image of each class of its only split is the test split, the others are for training. With `#validation`
            last, the same of its train split: for choices in which the test split has no say.
        role: `test` is the split that the papers evaluate, where the data set is one of theirs; `train`. A prepared
            data set's other splits go by their names.
        names: spelling of the classes, where the data set knows two.

    Raises:
        UserError: unknown name, missing file, or no labelled images.
    """
    if spec.endswith(VALIDATION):
        return _held_out(open_data(spec.removesuffix(VALIDATION), "train", names), role)
    if spec == "digits":
        if role not in ("train", "test"):
            raise UserError(f"'digits' has no split '{role}': it has train and test.")
        return Digits(role)
    place, holdout, _ = spec.partition(HOLDOUT)
    place = locate(place)
    if not holdout:
        return _open(place, role, names)
    return _held_out(_open(place, "test", names), role)


def _open(place: str, role: str, names: Names) -> ImageSet:
    if "://" not in place:
        path = Path(place)
        if path.is_file() or path.suffix == ".parquet":
            return ParquetImages([path], path.stem)
        if not path.is_dir():
            raise _unknown(place)
        if not (path / MANIFEST).is_file():
            return _open_folder(path, role)
    store = Store(place)
    manifest = open_manifest(store)
    if manifest.kind != "classification":
        raise UserError(f"'{manifest.name}' has captions, not classes: use `rayclip retrieval`.")
    row = ROWS.get(manifest.name)
    data = PreparedImages(store, manifest, choose_split(manifest, role), names)
    if row is not None:
        data.resize = row.resize
    return data


def open_manifest(store: Store) -> Manifest:
    """The manifest of a data set that has to be there. Raises `UserError`."""
    try:
        manifest = read_manifest(store)
    except OSError as error:
        raise UserError(f"{store.root} cannot be read: {str(error).splitlines()[0]}") from error
    if manifest is None:
        raise UserError(f"{store.root} holds no prepared data set: it has no {MANIFEST}.")
    return manifest


def choose_split(manifest: Manifest, role: str) -> str:
    """The split of a prepared data set that is trained on (`train`), evaluated (`test`), or called by its name."""
    row = ROWS.get(manifest.name)
    wanted: tuple[str, ...] = (role,)
    if role == "test":
        wanted = (row.evaluated,) if row is not None else ("test", "val")
    for split in wanted:
        if split in manifest.splits:
            return split
    there = ", ".join(manifest.splits)
    if role == "train" and row is not None and "train" not in row.splits:
        raise UserError(
            f"'{manifest.name}' has no train split, the papers evaluate on all its images: write "
            f"{manifest.name}{HOLDOUT} to keep every fifth image of each class for the test."
        )
    raise UserError(
        f"of '{manifest.name}' only {there} is prepared: `rayclip data prepare {manifest.name} --splits {wanted[0]}` "
        "adds the missing split."
    )


def _unknown(place: str) -> UserError:
    name = Path(place).name
    if name in ROWS and place == locate(name):
        return UserError(
            f"data set '{name}' is not prepared below {data_root()}: run `rayclip data prepare {name}`, or set "
            "RAYCLIP_DATA to the folder or URI that holds it."
        )
    return UserError(
        f"no data set or file '{place}': give a .parquet file, a folder of them, or one of "
        f"{', '.join(sorted(CLASSIFIED))}."
    )


def _open_folder(folder: Path, role: str) -> ImageSet:
    # A file of `validation*` is one of `val*` as well.
    prefixes = _FILES.get(role, (role,))
    files = sorted({f for prefix in prefixes for f in folder.glob(f"{prefix}*.parquet")})
    if not files:
        wanted = " or ".join(f"{prefix}*.parquet" for prefix in prefixes)
        raise UserError(f"folder {folder} holds no {role} images: it needs {wanted} in the Hugging Face layout.")
    return ParquetImages(files, folder.resolve().name)


def _held_out(whole: ImageSet, role: str) -> ImageSet:
    """Every fifth image of each class is the test split, in the file's order: fixed, without a seed."""
    rank = np.zeros(len(whole), dtype=np.int64)
    for label in np.unique(whole.labels):
        members = whole.labels == label
        rank[members] = np.arange(members.sum())
    part = whole.subset(np.flatnonzero((rank % 5 == 4) == (role == "test")))
    part.fingerprint = f"{whole.fingerprint}-{role}"  # other samples than the whole file's: never the same cell
    return part

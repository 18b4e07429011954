"""Open data sets, labelled or with captions, by the names that people give on the command line."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from rayclip.data.images import ImageSet, rank_in_class
from rayclip.data.labels import Reading, notes_on_classes, with_given_names
from rayclip.data.layout import WHOLE, find_files, prepare_advice
from rayclip.data.manifest import MANIFEST, Manifest, Names, open_manifest
from rayclip.data.parquet import PairSet, ParquetImages, own_name
from rayclip.data.prepared import PreparedImages, prepared_pairs
from rayclip.data.registry import DATASETS
from rayclip.data.spec import HOLDOUT, VALIDATION, parse_spec
from rayclip.data.tables import open_table
from rayclip.paths import expand_home
from rayclip.store import Store
from rayclip.types import UserError

ONLY = "#only"  # role: the test split, or the only split if there is no test split
_PAIRS = "(image: struct<bytes, path>, captions: list<string>)"


def data_root() -> str:
    """Return the root of prepared data: `RAYCLIP_DATA` (folder or object-store URI), or `~/.cache/rayclip/data`."""
    return expand_home(os.environ.get("RAYCLIP_DATA") or "~/.cache/rayclip/data")


def locate(spec: str) -> str:
    """Return the data set's name with the root added if it is a prepared one, since workers may have a different
    environment; `~` is expanded to the home folder. Raises `UserError`: unknown option after a `#`."""
    parsed = parse_spec(spec)
    return str(dataclasses.replace(parsed, place=_locate(parsed.place)))


def _locate(name: str) -> str:
    if not name or is_bundled(name) or "/" in name or name.endswith(".parquet") or Path(name).exists():
        return name
    folder = Store(data_root()).child(name)
    there = name in DATASETS or (folder.path("").is_dir() if folder.is_local else folder.size(MANIFEST) is not None)
    return folder.root if there else name


def is_bundled(name: str) -> bool:
    """Return whether a data set comes with a package and needs no preparing."""
    return name in DATASETS and DATASETS[name].open is not None


def open_data(spec: str, role: str, names: Names = "curated") -> ImageSet:
    """Open labelled images.

    Args:
        spec: a bundled data set, such as `digits`; a prepared data set's name, folder or URI; a `.parquet` file, used
            whole; or a folder of such files in one of the forms that `find_files` knows. Options for reading may
            follow: `#label=COLUMN`, `#image=COLUMN`, `#labels-from=1`, `#names=FILE` (`Reading`). With `#holdout` after
            them, every fifth image of each class of the only split forms the test split, and the others are for
            training. With `#validation` last, the train split is divided in the same way: for choices that must not use
            the test split.
        role: `test` (for a data set of the papers, the split that they evaluate) or `train`. Other splits of a
            prepared data set go by their names.
        names: spelling of the class names, if the data set has two.

    Raises:
        UserError: unknown name, missing file, no such split, or no labelled images.
    """
    parsed = parse_spec(spec)
    if parsed.part and role not in ("train", "test"):
        raise UserError(f"'{spec}' has no {role} split: {parsed.part} divides one split into train and test.")
    if parsed.part.endswith(VALIDATION):
        whole = dataclasses.replace(parsed, part=parsed.part.removesuffix(VALIDATION))
        return _held_out(open_data(str(whole), "train", names), role)
    data = _open(_locate(parsed.place), ONLY if parsed.part else role, names, parsed.reading)
    return _held_out(data, role) if parsed.part else data


def _open(place: str, role: str, names: Names, reading: Reading) -> ImageSet:
    if (info := DATASETS.get(place)) is not None and info.open is not None:
        split = info.evaluated if role in ("test", ONLY) else role
        if split not in info.splits:
            raise UserError(f"'{place}' has no split '{split}': it has {' and '.join(info.splits)}.")
        return _renamed(info.open(split), place, reading)
    path = Path(place)
    if not _is_prepared(place):
        if path.is_file() and (command := prepare_advice(path, own_name(path.stem))):
            raise UserError(f"{path} is read after it is prepared: `{command}`.")
        if _is_file(path):
            return ParquetImages([path], path.stem, reading)
        if not path.is_dir():
            raise _unknown(place)
        return _open_folder(path, role, reading)
    store = Store(place)
    manifest = open_manifest(store)
    if manifest.kind != "classification":
        raise UserError(f"'{manifest.name}' has captions, not classes: use `rayclip retrieval`.")
    data = PreparedImages(store, manifest, choose_split(manifest, role, place), names)
    if manifest.name in DATASETS:
        data.resize = DATASETS[manifest.name].resize
    return _renamed(data, place, reading)


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
        raise UserError(f"--data names nothing: give a .parquet file {_PAIRS}, or a prepared data set's name.")
    parsed = parse_spec(spec)
    if parsed.part or parsed.reading != Reading():
        raise UserError(f"{spec}: image-caption data are given by their place alone: leave out what follows the #.")
    place = _locate(parsed.place)
    path = Path(place)
    if not _is_prepared(place):
        if _is_file(path):
            return PairSet([path], path.stem)
        if not path.is_dir():
            raise UserError(
                f"no image-caption data '{spec}': give a .parquet file {_PAIRS}, a folder with test*.parquet, or run "
                "`rayclip data prepare flickr8k` (or flickr30k, mscoco_captions) and give that name."
            )
        if (files := _files(path, "test")) is None:
            raise UserError(f"folder {path} holds no test pairs: it needs test*.parquet or val*.parquet {_PAIRS}.")
        return PairSet(files, path.resolve().name)
    store = Store(place)
    manifest = open_manifest(store)
    if manifest.kind != "captions":
        raise UserError(f"'{manifest.name}' has classes, not captions: use `rayclip eval`.")
    return prepared_pairs(store, manifest, choose_split(manifest, split or "test"))


def open_either(place: str, split: str | None = None) -> ImageSet | PairSet:
    """Open a `.parquet` file or a prepared data set as what it is; `split` is None for the evaluated one."""
    alone = _locate(parse_spec(place).place)
    captions = False
    if alone.endswith(".parquet"):
        captions = "captions" in open_table(Path(alone)).schema_arrow.names
    elif not is_bundled(alone) and _is_prepared(alone):
        captions = open_manifest(Store(alone)).kind == "captions"
    return open_pairs(place, split) if captions else open_data(place, split or "test")


def _is_prepared(place: str) -> bool:
    return "://" in place or (Path(place) / MANIFEST).is_file()


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.suffix == ".parquet" and not path.is_dir())


def _renamed(data: ImageSet, place: str, reading: Reading) -> ImageSet:
    """Apply the class names of a file to a data set whose columns are fixed."""
    if options := reading.decisive():
        raise UserError(
            f"{place} tells its images and labels itself: leave {''.join(f'#{key}=… ' for key in options)}away."
        )
    given = reading.class_names()
    if given is None:
        return data
    if len(given) != len(data.class_names):
        raise UserError(f"{reading.names} names {len(given)} classes, but '{data.name}' has {len(data.class_names)}.")
    data.class_names, note = with_given_names(data.class_names, given, str(reading.names))
    counts = np.bincount(data.labels, minlength=len(given)).tolist()
    new = [*([note] if note else []), *notes_on_classes(data.class_names, counts)]
    data.notes = tuple(dict.fromkeys((*data.notes, *new)))
    return data


def choose_split(manifest: Manifest, role: str, place: str = "") -> str:
    """Return the split of a prepared data set to train on (`train`), to evaluate (`test`), or of a given name.

    Args:
        place: where the data set is, for the suggestion in the error message.

    Raises:
        UserError: the data set has no such split.
    """
    name, info = manifest.name, DATASETS.get(manifest.name)
    wanted: tuple[str, ...] = (role,)
    if role in ("test", ONLY):
        wanted = (info.evaluated,) if info is not None else ("test", "val")
    for split in wanted:
        if split in manifest.splits:
            return split
    there = ", ".join(manifest.splits)
    if role == ONLY and len(manifest.splits) == 1:
        return there
    if info is None:
        if manifest.kind == "captions":
            raise UserError(f"'{name}' has no {wanted[0]} split, only {there}: prepare one that has.")
        shown = name if not place or place == _locate(name) else place
        raise UserError(f"'{name}' has no {wanted[0]} split, {_split_advice(shown, role, there)}")
    if role == "train" and "train" not in info.splits:
        raise UserError(
            f"'{name}' has no train split, the papers evaluate on all its images: write {name}{HOLDOUT} to keep every "
            "fifth image of each class for the test."
        )
    kind = manifest.source.get("kind")
    source = f"--source {kind}" if kind in ("torchvision", "hub") else f"--source {kind} PLACE"
    raise UserError(
        f"of '{name}' only {there} is prepared: `rayclip data prepare {name} {source} --splits {wanted[0]}` adds the "
        "missing split."
    )


def _split_advice(place: str, role: str, there: str) -> str:
    """Return advice for a missing split."""
    if role not in ("train", "test", ONLY):
        return f"only {there}: name one of those."
    if "," in there:
        return f"only {there}: keep one of them by itself, and write {HOLDOUT} behind it."
    return f"only {there}: write {place}{HOLDOUT} to keep every fifth image of each class for the test."


def _unknown(place: str) -> UserError:
    name = Path(place).name
    if name in DATASETS and place == _locate(name):
        return UserError(
            f"data set '{name}' is not prepared below {data_root()}: run `rayclip data prepare {name}`, or set "
            "RAYCLIP_DATA to the folder or URI that holds it."
        )
    known = sorted(known for known, info in DATASETS.items() if info.classes)
    return UserError(
        f"no data set or file '{place}': give a .parquet file, a folder of them, or one of {', '.join(known)}."
    )


def _open_folder(folder: Path, role: str, reading: Reading) -> ImageSet:
    name, split = folder.resolve().name, "test" if role == ONLY else role
    if (files := _files(folder, role)) is not None:
        return ParquetImages(files, name, reading)
    if found := find_files(folder):
        raise UserError(
            f"folder {folder} holds no {split} images, {_split_advice(str(folder), role, ', '.join(found))}"
        )
    if command := prepare_advice(folder, own_name(name)):
        raise UserError(f"folder {folder} is read after it is prepared: `{command}`.")
    raise UserError(
        f"folder {folder} holds no {split} images: it needs {split}*.parquet in the Hugging Face layout (in it, in "
        f"data/ below, or as CONFIG/{split}/0000.parquet), what `save_to_disk` writes, or a folder of images for "
        "each class."
    )


def _files(folder: Path, role: str) -> list[Path] | None:
    """Return the files of a split in a folder without a manifest; None if it has no such split."""
    found = find_files(folder)
    wanted = ("test", "val") if role in ("test", ONLY) else (role,)
    if role == ONLY and len(found) == 1:
        wanted = (*wanted, *found)
    return next((found[split] for split in (*wanted, WHOLE) if split in found), None)


def _held_out(whole: ImageSet, role: str) -> ImageSet:
    """Hold out every fifth image of each class, in file order, as the test split: fixed, without a seed."""
    held = rank_in_class(whole.labels) % 5 == 4
    if role == "test" and not held.any():
        raise UserError(f"no class of '{whole.name}' has five images: there is none to keep for the test.")
    part = whole.subset(np.flatnonzero(held == (role == "test")))
    part.fingerprint = f"{whole.fingerprint}-{role}"  # not the samples of the whole file, so never the same cell
    return part

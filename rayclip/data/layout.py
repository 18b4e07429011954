"""Find a data set's files in a folder: flat, in the hub's layout, or as `save_to_disk` writes them."""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rayclip.data.labels import read_json
from rayclip.types import UserError

# Our split names and the spellings found in published files
SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
WHOLE = ""  # the only split, for files whose names indicate none

_OF = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")
_DEEPEST = 4  # levels of folders that are searched
_LOOKED_AT = 2000  # most files examined to tell what a folder holds


def find_files(folder: Path) -> dict[str, list[Path]]:
    """Find the Parquet or Arrow files of each split, in order; empty if the folder holds none.

    Known forms: `train*.parquet`, `val*`, `test*` in the folder or in its `data/`; `CONFIG/test/0000.parquet` and
    `CONFIG/test-00000-of-00001.parquet`; what `save_to_disk` writes, for one split or several; or Parquet files whose
    names indicate no split, which are `WHOLE`. Raises `UserError`: several configurations without a default, or missing
    files."""
    if (folder / "dataset_dict.json").is_file():
        names = _listed(folder / "dataset_dict.json").get("splits")
        saved = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        return {own_split(name): _saved(folder / name) for name in saved}
    if (folder / "state.json").is_file():
        return {WHOLE: _saved(folder)}
    for place in (folder, folder / "data"):
        flat = {split: sorted(place.glob(f"{split}*.parquet")) for split in SPLITS}  # `val` also covers `validation`
        if any(flat.values()):
            return {split: _complete(files) for split, files in flat.items() if files}
    below = {path.relative_to(folder).as_posix(): path for path in _below(folder, ".parquet", _DEEPEST)}
    if configs := by_config(below):
        chosen = choose_config(configs)
        if chosen is None:
            known = sorted(configs)
            raise UserError(
                f"folder {folder} has the configurations {', '.join(known)}: give the folder of one, such as "
                f"{folder / known[0]}."
            )
        return {split: _complete([below[f] for f in files]) for split, files in configs[chosen].items()}
    plain = sorted(folder.glob("*.parquet"))
    return {WHOLE: _complete(plain)} if plain else {}


def by_config(files: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Group Parquet files, in order, by configuration (their folder; "" for the root or `data/`) and split."""
    found: dict[str, dict[str, list[str]]] = {}
    for split, spellings in SPLITS.items():
        # SPLIT.parquet, SPLIT-00000-of-00002.parquet, SPLIT/0000.parquet; SPLIT_extra-0.parquet is another split.
        name = rf"(?:{'|'.join(spellings)})"
        pattern = re.compile(rf"(?:(.*)/)?{name}(?:(?:[-_.]\d[^/]*)?|/[^/]*)\.parquet")
        for file in sorted(files):
            if match := pattern.fullmatch(file):
                config = "" if match[1] in (None, "data") else match[1]
                found.setdefault(config, {}).setdefault(split, []).append(file)
    return found


def choose_config(configs: Collection[str]) -> str | None:
    """Return the only configuration, or else the default one; None if there is no default."""
    return next((c for c in (configs if len(configs) == 1 else ("", "default")) if c in configs), None)


def prepare_advice(place: Path, name: str) -> str | None:
    """Return the command that prepares class folders or a WebDataset, which cannot be read directly; else None."""
    tars = place.suffix == ".tar" if place.is_file() else any(_below(place, ".tar", 2))
    nested = (path for path in _below(place, "", _DEEPEST, limit=_LOOKED_AT) if path.parent != place)
    if not tars and not any(is_image_name(path.name) for path in nested):
        return None
    source = "webdataset" if tars else "folder"
    names = " --class-names FILE" if tars and not (place / "classnames.txt").is_file() else ""
    return f"rayclip data prepare {name} --source {source} {shlex.quote(str(place.absolute()))}{names}"


def own_split(spelling: str) -> str:
    return next((own for own, spellings in SPLITS.items() if spelling in spellings), spelling)


def split_named_in(stem: str) -> str | None:
    """Return the split that a file's name indicates, such as `cifar10-test` or `train-0`; None for none."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((own for own, spellings in SPLITS.items() if not set(spellings).isdisjoint(words)), None)


def is_image_name(name: str) -> bool:
    """Return whether a file's name ends like those of images that Pillow can open."""
    return Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in Image.OPEN


def _saved(folder: Path) -> list[Path]:
    """Return the files of one split written by `save_to_disk`."""
    state = _listed(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} is a selection of rows kept apart from them, as old versions of the datasets library write it: "
            "save it again with a newer one."
        )
    listed = state.get("_data_files")
    files = [folder / str(f.get("filename")) for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
    missing = next((f for f in files if f.parent != folder or not f.is_file()), None)
    if missing is not None or not files:
        what = f"{missing} is missing" if missing else "state.json names no files"
        raise UserError(f"{folder} is not whole ({what}): save it again.")
    return files


def _listed(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    return raw if isinstance(raw, dict) else {}


def _complete(files: Sequence[Path]) -> list[Path]:
    """Return the files of one split after checking that no numbered file (`…-00000-of-00003`) is missing."""
    there: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := _OF.fullmatch(file.stem):
            there.setdefault((file.parent, match[1], int(match[3])), set()).add(int(match[2]))
    for (folder, stem, count), numbers in there.items():
        gone = sorted(set(range(count)) - numbers)
        if gone:
            raise UserError(
                f"{folder} holds {len(numbers)} of the {count} files {stem}-*-of-{count:05d}: number {gone[0]} is "
                "missing; fetch it."
            )
    return list(files)


def _below(folder: Path, ending: str, depth: int, limit: int | None = None) -> list[Path]:
    """Return the files with this ending at most `depth` levels below, sorted; hidden files and folders are skipped."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        deep_enough = len(Path(place).relative_to(folder).parts) + 1 >= depth
        folders[:] = [] if deep_enough else sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if name.endswith(ending) and not name.startswith(".")]
        if limit is not None and len(found) >= limit:
            break
    return sorted(found)

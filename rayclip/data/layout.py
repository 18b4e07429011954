"""Find a data set's files in a folder: flat, in the hub's layout, or as `save_to_disk` writes them."""

import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rayclip.types import UserError

# Our split names and the spellings found in published files
SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
WHOLE = ""  # the only split, for files whose names indicate none

_PREFIXES = {"train": "train", "val": "val", "test": "test"}  # `val` also covers `valid` and `validation`
_OF = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")
_DEEPEST = 4  # levels of folders that are searched
_LOOKED_AT = 2000  # most files examined to tell what a folder holds


def find_files(folder: Path) -> dict[str, list[Path]]:
    """Find the Parquet or Arrow files of each split, in order; empty if the folder holds none.

    Known forms: `train*.parquet`, `val*`, `test*` in the folder or in its `data/`; `CONFIG/test/0000.parquet` and
    `CONFIG/test-00000-of-00001.parquet`; what `save_to_disk` writes, for one split or several; or Parquet files whose
    names indicate no split, which are `WHOLE`.

    Raises:
        UserError: several configurations without a default, or missing files.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits")
        names = [s for s in splits if isinstance(s, str)] if isinstance(splits, list) else []
        return {_own(name): _saved(folder / name) for name in names}
    if (folder / "state.json").is_file():
        return {WHOLE: _saved(folder)}
    for place in (folder, folder / "data"):
        flat = {split: sorted(place.glob(f"{prefix}*.parquet")) for split, prefix in _PREFIXES.items()}
        flat = {split: files for split, files in flat.items() if files}
        if flat:
            return {split: _complete(files) for split, files in flat.items()}
    below = {path.relative_to(folder).as_posix(): path for path in _below(folder, ".parquet", _DEEPEST)}
    if configs := by_config(below):
        chosen = choose_config(configs)
        if chosen is None:
            known = sorted(configs)
            raise UserError(
                f"folder {folder} has the configurations {', '.join(known)}: give the folder of one, such as "
                f"{folder / known[0]}."
            )
        return {split: _complete([below[f] for f in files]) for split, (_, files) in configs[chosen].items()}
    plain = sorted(folder.glob("*.parquet"))
    return {WHOLE: _complete(plain)} if plain else {}


def by_config(files: Collection[str]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Group Parquet files by configuration, the folder they are in ("" for the root or `data/`), and our split.

    Returns:
        configuration -> split -> its spelling in the files, and the files in order.
    """
    found: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for split, spellings in SPLITS.items():
        for spelling in spellings:
            for config, of_split in split_files(files, spelling).items():
                found.setdefault(config, {})[split] = spelling, of_split
    return found


def split_files(files: Iterable[str], split: str) -> dict[str, list[str]]:
    """Return the files of one split, spelled as in the files, in order and by configuration; see `by_config`."""
    # Matches SPLIT.parquet, SPLIT-00000-of-00002.parquet, but not SPLIT_extra-0.parquet, which is another split
    pattern = re.compile(rf"{re.escape(split)}(?:[-_.]\d.*)?\.parquet")
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        *folders, base = file.split("/")
        if not base.endswith(".parquet"):
            continue
        if not pattern.fullmatch(base):
            if folders[-1:] != [split]:
                continue
            folders.pop()
        config = "/".join(folders)
        found.setdefault("" if config == "data" else config, []).append(file)
    return found


def choose_config(configs: Collection[str]) -> str | None:
    """Return the only configuration, or else the default one; None if there is no default."""
    return next((c for c in (configs if len(configs) == 1 else ("", "default")) if c in configs), None)


def prepare_advice(place: Path, name: str) -> str | None:
    """Return the command that prepares class folders or a WebDataset, which cannot be read directly; else None."""
    if place.is_file():
        tars, images, listed = place.suffix == ".tar", False, False
    elif place.is_dir():
        tars = any(True for _ in _below(place, ".tar", 2))
        images = any(_is_image(path) for path in _below(place, "", _DEEPEST, limit=_LOOKED_AT) if path.parent != place)
        listed = (place / "classnames.txt").is_file()
    else:
        return None
    if not tars and not images:
        return None
    source = "webdataset" if tars else "folder"
    names = " --class-names FILE" if tars and not listed else ""
    return f"rayclip data prepare {name} --source {source} {shlex.quote(str(place.absolute()))}{names}"


def split_named_in(stem: str) -> str | None:
    """Return the split that a file's name indicates, such as `cifar10-test` or `train-0`; None for none."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((own for own, spellings in SPLITS.items() if not set(spellings).isdisjoint(words)), None)


def _own(split: str) -> str:
    return next((own for own, spellings in SPLITS.items() if split in spellings), split)


def _saved(folder: Path) -> list[Path]:
    """Return the files of one split written by `save_to_disk`."""
    state = _json(folder / "state.json")
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


def _is_image(path: Path) -> bool:
    extensions = Image.registered_extensions()
    return extensions.get(path.suffix.lower()) in Image.OPEN


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): save the data set again.") from error
    return raw if isinstance(raw, dict) else {}

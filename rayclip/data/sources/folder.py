"""Source of folders of image files: class folders as in torchvision's ImageFolder, ImageNet, TinyImageNet."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from rayclip.data.labels import Reading, first_few, with_given_names
from rayclip.data.layout import is_image_name
from rayclip.data.registry import DatasetInfo
from rayclip.data.sources.annotations import CaptionFolder
from rayclip.data.sources.base import Entry, FileSource, Source, describe_files, digest, readable
from rayclip.types import UserError

_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_LISTED = ("train", "val", "test")  # the splits of CoOp's lists
_JUNK = frozenset({"__MACOSX", "@eaDir"})  # what archives and file servers leave behind


def open_folder(info: DatasetInfo | None, path: Path, reading: Reading = Reading()) -> Source:
    """Open a folder of image files.

    Without `info`, or where its form is `imagefolder`: `train/`, `val/` (or `validation/`), `test/` with a folder per
    class, or the class folders directly, which form the split `test`. ImageNet: `train/<wnid>/`, `val/<wnid>/`, or
    Kaggle's layout. TinyImageNet: the layout of its archive. CoOp: its list beside the folder of images. Captions: see
    `annotations`.

    Args:
        reading: its class names replace the folders' names: the same names in another spelling, or names in the
            folders' order, which is numerical if they are numbered 0..K-1 or 1..K.

    Raises:
        UserError: no such folder, no images in that form, or another number of classes than the data set has.
    """
    if not path.is_dir():
        raise UserError(f"no such folder: {path}.")
    form = info.folder if info else "imagefolder"
    if reading.names is not None and form != "imagefolder":
        raise UserError(f"{path} names its classes itself: leave --class-names away.")
    if info and form == "captions":
        return CaptionFolder(path, info.name)
    try:
        if form == "imagenet":
            return _imagenet(info, path)
        if form == "coop":
            return _coop(info, path)
        if form == "tiny_imagenet" and (found := _first(path / "tiny-imagenet-200", path, holding="wnids.txt")):
            return _tiny_imagenet(info, found)
        return _class_folders(path, reading)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable: {error}.") from error


class _Walk:
    """The image files below a root; counts the files that are skipped."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._skipped: Counter[str] = Counter()
        self._outside: Counter[str] = Counter()

    def folders(self, folder: Path, note: bool = True) -> list[str]:
        """Return the names of the folders in a folder, sorted; with `note`, image files beside them are counted."""
        names = []
        for entry in os.scandir(folder):
            if entry.is_dir() and not _hidden(entry.name):
                names.append(entry.name)
            elif note and _is_image(entry):
                self._outside[self.relative(folder)] += 1
        return sorted(names)

    def images(self, folder: Path, expected: str = "") -> list[str]:
        """Return the paths of the image files below a folder, at any depth, sorted; none if the folder is missing.
        Files that end in `expected` belong there and are not counted as skipped."""
        return sorted(self._below(folder, expected, ())) if folder.is_dir() else []

    def _below(self, folder: Path, expected: str, above: tuple[str, ...]) -> Iterator[str]:
        here = os.path.realpath(folder)
        if here in above:  # a symbolic link to a parent folder
            return
        for entry in os.scandir(folder):
            if entry.is_dir():
                if not _hidden(entry.name):
                    yield from self._below(folder / entry.name, expected, (*above, here))
            elif _is_image(entry):
                yield self.relative(Path(entry.path))
            elif not (expected and entry.name.endswith(expected)):
                extension = os.path.splitext(entry.name)[1].lower()
                self._skipped[readable(entry.name if _hidden(entry.name) or not extension else extension)] += 1

    def relative(self, path: Path) -> str:
        relative = path.relative_to(self.root).as_posix()
        return "" if relative == "." else relative

    def source(
        self,
        form: str,
        entries: Mapping[str, list[Entry]],
        class_names: Sequence[str],
        label_keys: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> FileSource:
        """Return the source of these files. Raises `UserError` if there are none."""
        if not any(entries.values()):
            raise UserError(
                f"{self.root} holds no images: it needs a folder for each class, or train/, val/, test/ of them."
            )
        outside = [
            f"{_count(n, 'image file')} left out, being in {place or 'the folder itself'} and no class folder."
            for place, n in sorted(self._outside.items())
        ]
        if total := self._skipped.total():
            kinds = ", ".join(sorted(self._skipped)[:5]) + (", …" if len(self._skipped) > 5 else "")
            outside.append(f"{_count(total, 'file')} that {'is' if total == 1 else 'are'} no image left out ({kinds}).")
        splits = {split: describe_files(self.root, of_split) for split, of_split in entries.items()}
        classes = digest((*class_names, *label_keys))
        description = {"kind": "folder", "form": form, "classes": classes, "splits": splits}
        return FileSource(self.root, entries, description, class_names, label_keys, [*notes, *outside])


def _class_folders(root: Path, reading: Reading) -> FileSource:
    walk, given = _Walk(root), reading.class_names()
    top = walk.folders(root, note=False)
    split_of = {name: _SPLITS[name.lower()] for name in top if name.lower() in _SPLITS}
    # A class may also be called 'train': a split folder contains folders, a class folder contains images.
    if not any(walk.folders(root / name, note=False) for name in split_of):
        split_of = {"": "test"}
    if len(set(split_of.values())) < len(split_of):
        raise UserError(f"{root} has both val/ and validation/: keep one of them.")
    found = {name: walk.folders(root / name) for name in split_of}
    # Sorted like torchvision's ImageFolder, so that published folder forms get their published labels.
    every = {name for names in found.values() for name in names}
    by_number = given is not None and all(name.isdecimal() for name in every)  # the order of a list of names
    spellings: dict[str, list[str]] = {}
    for name in sorted(every, key=int) if by_number else sorted(every):
        spellings.setdefault(" ".join(name.replace("_", " ").split()).casefold(), []).append(name)
    label_of = {name: label for label, names in enumerate(spellings.values()) for name in names}
    entries = {
        split: sorted((Entry(p, label_of[c]) for c in found[name] for p in walk.images(root / name / c)), key=_by_label)
        for name, split in sorted(split_of.items(), key=lambda item: list(_SPLITS.values()).index(item[1]))
    }
    notes = [
        f"Class folders {' and '.join(map(repr, map(readable, names)))} spell one name and are one class."
        for names in spellings.values()
        if len(names) > 1
    ]
    names = tuple(readable(spelled[0]) for spelled in spellings.values())
    filled = {entry.label for listed in entries.values() for entry in listed}
    if empty := [name for label, name in enumerate(names) if label not in filled]:
        notes.append(f"{_count(len(empty), 'class folder')} without images: {first_few(empty)}.")
    if ignored := [readable(name) for name in top if "" not in split_of and name not in split_of]:
        notes.append(f"Not a split, and left out: {first_few(ignored)}.")
    if given is not None:
        if len(given) != len(names):
            raise UserError(f"{reading.names} names {len(given)} classes, but {root} has {len(names)} class folders.")
        if by_number and (int(names[0]) > 1 or int(names[-1]) - int(names[0]) + 1 != len(names)):
            raise UserError(f"the class folders of {root} are numbered with gaps: call them by their names instead.")
        names, note = with_given_names(names, given, str(reading.names))
        notes += [note] if note and not by_number else []
    return walk.source("imagefolder", entries, names, notes=notes)


def _imagenet(info: DatasetInfo | None, root: Path) -> FileSource:
    """Read `{train,val}/<wnid>/`, or Kaggle's layout below `ILSVRC/Data/CLS-LOC`: flat val folder, lists of labels."""
    walk = _Walk(root)
    base = _first(root / "ILSVRC" / "Data" / "CLS-LOC", root / "Data" / "CLS-LOC", root) or root
    folders = {split: base / split for split in ("train", "val") if (base / split).is_dir()}
    if not folders:
        raise UserError(f"{root} is not ImageNet: it needs train/ or val/, or ILSVRC/Data/CLS-LOC as Kaggle has it.")
    inside = {split: walk.folders(folder, note=split == "train") for split, folder in folders.items()}
    solution = root / "LOC_val_solution.csv"
    words = dict(line.partition(" ")[::2] for line in _lines(root / "LOC_synset_mapping.txt"))
    wnids = sorted(words or {n for found in inside.values() for n in found if n[:1] == "n" and n[1:].isdigit()})
    label_of = _numbered(info, root, wnids)
    entries = {
        split: _in_class_folders(walk, folder, inside[split], label_of, "no class of ImageNet: {}")
        for split, folder in folders.items()
    }
    if "val" in folders and not inside["val"]:
        if not solution.is_file():
            raise UserError(f"{folders['val']} has no class folders: put Kaggle's {solution.name} into {root}.")
        with solution.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if len(line) >= 2][1:]  # the first is the header
        rows = [(f"{image}.JPEG", boxes.split(" ")[0]) for image, boxes, *_ in lines]
        entries["val"] = _annotated(walk, folders["val"], rows, label_of, solution.name)
    return walk.source("imagenet", entries, [words.get(w) or w for w in wnids], wnids)


def _tiny_imagenet(info: DatasetInfo | None, root: Path) -> FileSource:
    """Read `wnids.txt` (label order), `words.txt`, `train/<wnid>/images/`, `val/images/`, `val/val_annotations.txt`."""
    walk, wnids = _Walk(root), _lines(root / "wnids.txt")
    label_of = _numbered(info, root, wnids)
    words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    entries: dict[str, list[Entry]] = {}
    for split in ("train", "val"):
        folder, annotations = root / split, root / split / "val_annotations.txt"
        if annotations.is_file():
            rows = [(*line.split("\t"), "")[:2] for line in _lines(annotations)]
            entries[split] = _annotated(walk, folder / "images", rows, label_of, annotations.name)
        elif folder.is_dir():  # also val, if somebody has sorted it into class folders
            names = walk.folders(folder)
            listed = _in_class_folders(walk, folder, names, label_of, "wnids.txt does not have {}", "_boxes.txt")
            entries[split] = sorted(listed, key=_by_label)
    return walk.source("tiny_imagenet", entries, [words.get(w) or w for w in wnids], wnids)


def _coop(info: DatasetInfo | None, root: Path) -> FileSource:
    """Read CoOp's list `split_zhou_*.json`: for each split `[[file, label, class name], …]`, the files being below the
    list's folder or one of the folders in it."""
    lists = sorted(root.glob("split_zhou_*.json"))
    if len(lists) != 1:
        raise UserError(f"{root} holds {len(lists)} of CoOp's lists: it needs one split_zhou_*.json beside the images.")
    try:
        listed = json.loads(lists[0].read_text(encoding="utf-8"))
        rows = {split: [(str(f), int(label), str(name)) for f, label, name in listed[split]] for split in _LISTED}
        names = {label: name for split in _LISTED for _, label, name in rows[split]}
        first = rows["test"][0][0]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{lists[0]} is no list of CoOp's: it needs train, val and test of [file, label, name]."
        ) from error
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{lists[0]} names {len(names)} classes, but does not number them 0 to {len(names) - 1}.")
    walk = _Walk(root)
    places = [root, *(root / name for name in walk.folders(root, note=False))]
    places += [place / name for place in places[1:] for name in walk.folders(place, note=False)]
    base = next((place for place in places if (place / first).is_file()), root)
    there = set(walk.images(base))

    def entry(file: str, label: int) -> Entry:
        path = walk.relative(base / file) if _is_below(file) else file
        return (
            Entry(path, label) if path in there else Entry(path, None, f"{lists[0].name} names it, but it is not there")
        )

    entries = {split: [entry(file, label) for file, label, _ in rows[split]] for split in _LISTED}
    return walk.source("coop", entries, [names[label] for label in range(len(names))])


def _is_below(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def _in_class_folders(
    walk: _Walk, folder: Path, names: Iterable[str], label_of: Mapping[str, int], problem: str, expected: str = ""
) -> list[Entry]:
    """Return the files in the class folders `names`; those in a folder of no class get the `problem`."""
    return [
        Entry(path, label_of.get(name), None if name in label_of else problem.format(name))
        for name in names
        for path in walk.images(folder / name, expected)
    ]


def _annotated(
    walk: _Walk, folder: Path, rows: Iterable[tuple[str, ...]], label_of: Mapping[str, int], source: str
) -> list[Entry]:
    """Return the files of one folder with their classes from a list, sorted by path; mismatches get a `problem`."""
    wnid_of: dict[str, set[str]] = {}
    for name, wnid in rows:
        wnid_of.setdefault(walk.relative(folder / name), set()).add(wnid)
    files = set(walk.images(folder))
    entries = []
    for path in sorted(files | wnid_of.keys()):
        wnids = wnid_of.get(path, set())
        wnid = min(wnids, default="")
        problem = None
        if path not in files:
            problem = f"{source} names it, but there is no such image file"
        elif not wnids:
            problem = f"{source} does not name it"
        elif len(wnids) > 1:
            problem = f"{source} gives it several classes: {', '.join(sorted(wnids))}"
        elif wnid not in label_of:
            problem = f"{source} gives it an unknown class: {wnid or 'none'}"
        entries.append(Entry(path, None if problem else label_of[wnid], problem))
    return entries


def _numbered(info: DatasetInfo | None, root: Path, wnids: list[str]) -> dict[str, int]:
    """Return the label of each WordNet id after checking that they are the data set's."""
    if len(set(wnids)) < len(wnids):
        raise UserError(f"{root}/wnids.txt names a class twice.")
    if info and info.classes and len(wnids) != info.classes:
        raise UserError(
            f"{root} has {len(wnids):,} classes (n01234567, …), but {info.title} has {info.classes:,}: take the "
            "complete data set."
        )
    return {wnid: label for label, wnid in enumerate(wnids)}


def _first(*folders: Path, holding: str = "") -> Path | None:
    return next((folder for folder in folders if (folder / holding).exists()), None)


def _lines(path: Path) -> list[str]:
    """Return a file's lines that are not blank; none if there is no such file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line for line in text.splitlines() if line.strip()]


def _is_image(entry: "os.DirEntry[str]") -> bool:
    """A dangling link is an unreadable sample; a pipe is no sample."""
    return not _hidden(entry.name) and is_image_name(entry.name) and (entry.is_file() or entry.is_symlink())


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _JUNK


def _by_label(entry: Entry) -> tuple[int, str]:
    return (-1 if entry.label is None else entry.label, entry.path)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"

"""Source of image-caption data in its published forms: Karpathy's JSON, COCO's own annotations, Flickr's token files.

Retrieval is reported on Karpathy's splits (Karpathy & Fei-Fei 2015, `caption_datasets.zip`); if a folder holds them,
they take precedence over the publishers' own annotations.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from rayclip.data.labels import plain_text, read_json, read_text
from rayclip.data.sources.base import Entry, FileSource, Record
from rayclip.types import UserError

Form = Literal["karpathy", "coco", "token"]

# File names of each data set's annotations, best first.
_FILES: dict[str, tuple[tuple[Form, str], ...]] = {
    "coco": (
        ("karpathy", "dataset_coco.json"),
        ("coco", "captions_val2017.json"),
        ("coco", "captions_val2014.json"),
        ("coco", "captions_train2017.json"),
        ("coco", "captions_train2014.json"),
    ),
    "flickr30k": (("karpathy", "dataset_flickr30k.json"), ("token", "results_20130124.token")),
    "flickr8k": (("karpathy", "dataset_flickr8k.json"), ("token", "Flickr8k.token.txt")),
}
_IMAGES = ("val2014", "train2014", "val2017", "train2017", "flickr30k-images", "Flicker8k_Dataset", "images")
_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # restval joins train, as usual
_FLICKR8K_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}
_NO_TEXT = "{} captions without text are left out."


@dataclass
class _Annotations:
    """Images with their captions, by split. `left_out` counts what became no record, by the sentence that says so."""

    files: list[Path]
    splits: dict[str, list[Entry]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


class CaptionFolder(FileSource):
    """A folder of images, with one of these annotations in it or in its `annotations/`:

    - Karpathy's `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`;
    - COCO's `captions_{train,val}{2017,2014}.json`: of one year, the newest that has a val file;
    - `results_20130124.token` (Flickr30k), `Flickr8k.token.txt` with the lists `Flickr_8k.{train,dev,test}Images.txt`.

    Images are searched where the annotations say, then in folders with the published names, in `images/` and in the
    folder itself. Records are in the annotations' order; captions are stripped and otherwise unchanged. An image that
    is missing, listed twice, without captions, or outside the folder becomes a record with a `problem`; annotations
    that belong to no image are counted in `notes`.

    Args:
        path: folder with images and annotations.
        name: name of the data set; if it contains `coco`, `flickr30k` or `flickr8k`, only the annotations of that one
            are used.

    Raises:
        UserError: no such folder; no annotations, unreadable ones, or those of several data sets.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}: give the one that holds the images and their captions.")
        form, files = _choose(path, name)
        found = _READERS[form](files)
        if not any(found.splits.values()):
            raise UserError(f"{files[0]} tells of no images: give the published file.")
        digests = {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in found.files}
        super().__init__(
            path,
            {split: _mark_repeated(entries) for split, entries in found.splits.items()},
            {"kind": "folder", "form": form, "files": digests},
            notes=(*found.notes, *(sentence.format(number) for sentence, number in found.left_out.items())),
        )

    def _record(self, entry: Entry) -> Record:
        name, problem = entry.path, _outside(entry.path)
        places = [name, f"images/{name}", f"images/{name.rpartition('/')[2]}", name.rpartition("/")[2]]
        if "/" not in name:
            places = [*(f"{folder}/{name}" for folder in _IMAGES), name]
        # os.path.isfile returns False, not an error, for names that no file system accepts.
        place = None if problem else next((place for place in places if os.path.isfile(self._root / place)), None)
        if place is None:
            return Record(path=name, captions=entry.captions, problem=problem or f"there is no image {name}")
        problem = entry.problem or (None if entry.captions else "the image has no captions")
        return super()._record(entry._replace(path=str(Path(place)), problem=problem))


def _outside(name: str) -> str | None:
    """Return why a name from annotations must not be opened; None if it may."""
    if not name:
        return "the annotations name no file"
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        return f"the file name {name!r} leads out of the folder"
    return None


def _mark_repeated(entries: Sequence[Entry]) -> list[Entry]:
    """Mark repeated images as problems and keep the first: a repeated image would compete with itself in retrieval."""
    seen: set[str] = set()
    marked = []
    for entry in entries:
        marked.append(entry._replace(problem="the image is listed twice") if entry.path in seen else entry)
        seen |= {entry.path} - {""}
    return marked


def _choose(folder: Path, name: str) -> tuple[Form, list[Path]]:
    """Choose the best available annotations; return their form and files."""
    kinds = [kind for kind in _FILES if kind in name.lower()] or list(_FILES)
    found: dict[str, list[tuple[Form, Path]]] = {}
    for kind in kinds:
        for form, file in _FILES[kind]:
            for place in (folder / file, folder / "annotations" / file):
                if place.is_file():
                    found.setdefault(kind, []).append((form, place))
    if not found:
        wanted = ", ".join(file for kind in kinds for _, file in _FILES[kind])
        raise UserError(f"{folder} holds no captions: none of {wanted} is there or in {folder / 'annotations'}.")
    if len(found) > 1:
        raise UserError(
            f"{folder} holds annotations of several data sets ({', '.join(f[0][1].name for f in found.values())}): "
            f"name the data set {' or '.join(found)}, or keep one's annotations."
        )
    ((files),) = found.values()
    best = files[0][0]
    return best, [file for form, file in files if form == best]


def _lists(file: Path, *keys: str) -> list[list[dict[str, Any]]]:
    """Read these lists of a JSON file. Raises `UserError` if there are none."""
    value = read_json(file)
    for key in keys:
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise UserError(f"{file} has no list '{key}', so it is not what its name says: fetch it again.")
    return [_dicts(value[key]) for key in keys]


def _dicts(values: Any) -> list[dict[str, Any]]:
    """Return the entries of a JSON list; an empty object for an entry that is none."""
    return [value if isinstance(value, dict) else {} for value in values] if isinstance(values, list) else []


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).split("\n") if line.strip()]


def _joined(folder: Any, name: Any) -> str:
    """Join `filepath/filename`, where the first may be absent; return "" if there is no file name."""
    name = plain_text(name)
    return f"{folder}/{name}" if name and plain_text(folder) else name


def _read_karpathy(files: Sequence[Path]) -> _Annotations:
    file = files[0]
    found = _Annotations([file])
    (images,) = _lists(file, "images")
    for image in images:
        split = image.get("split")
        if not isinstance(split, str) or split not in _KARPATHY_SPLITS:
            found.left_out["{} entries of " + file.name + " that belong to no known split are left out."] += 1
            continue
        captions = [plain_text(sentence.get("raw")) for sentence in _dicts(image.get("sentences"))]
        if empty := captions.count(""):
            found.left_out[_NO_TEXT] += empty
        entry = Entry(_joined(image.get("filepath"), image.get("filename")), captions=tuple(filter(None, captions)))
        found.splits.setdefault(_KARPATHY_SPLITS[split], []).append(entry)
    return found


def _read_coco(files: Sequence[Path]) -> _Annotations:
    """Read the files of one year: 2014 and 2017 split the same images differently, so using both would mix splits."""
    year = files[0].stem[-4:]
    used = {f.name: f for f in reversed(files) if f.stem.endswith(year)}
    found = _Annotations(sorted(used.values()))
    for file in found.files:
        split = "val" if "val" in file.stem else "train"
        captions: dict[Any, list[str]] = {}
        images, annotations = _lists(file, "images", "annotations")
        for annotation in annotations:
            key, text = annotation.get("image_id"), plain_text(annotation.get("caption"))
            if not text:
                found.left_out[_NO_TEXT] += 1
            elif not isinstance(key, int | str):
                found.left_out["{} captions that name no image are left out."] += 1
            else:
                captions.setdefault(key, []).append(text)
        found.splits[split] = []
        for image in images:
            key = image.get("id")
            own = captions.pop(key, []) if isinstance(key, int | str) else []
            name = _joined(f"{split}{year}", image.get("file_name"))
            found.splits[split].append(Entry(name, captions=tuple(own)))
        if unknown := sum(map(len, captions.values())):
            found.left_out["{} captions of images that " + file.name + " does not list are left out."] += unknown
    if "val" in found.splits:
        found.notes.append(
            f"split 'val' is COCO's own val{year} ({len(found.splits['val'])} images), not Karpathy's 5k test that "
            "papers report on: put dataset_coco.json beside it for that."
        )
    if ignored := sorted({f.name for f in files} - used.keys()):
        found.notes.append(f"{', '.join(ignored)}: of another year, not used.")
    return found


def _read_token(files: Sequence[Path]) -> _Annotations:
    file = files[0]
    found = _Annotations([file])
    captions: dict[str, tuple[str, ...]] = {}
    for line in _lines(file):
        key, tab, sentence = line.partition("\t")
        name, hash_, number = key.rpartition("#")
        if tab and hash_ and number.isdigit() and name:
            captions[name] = (*captions.get(name, ()), sentence.strip())
        else:
            found.left_out["{} lines of " + file.name + " that are no NAME#NUMBER and sentence are left out."] += 1
    for split, name in _FLICKR8K_LISTS.items():
        listed = file.with_name(f"Flickr_8k.{name}.txt")
        if "8k" in file.name and listed.is_file():
            found.files.append(listed)
            found.splits[split] = [Entry(name, captions=captions.get(name, ())) for name in _lines(listed)]
    if not found.splits:
        found.splits["test"] = [Entry(name, captions=own) for name, own in captions.items()]
        found.notes.append(
            f"{file.name} has no list of test images beside it, so split 'test' is all {len(captions)} images, not the "
            "1k that papers report on: put Karpathy's JSON beside it for that."
        )
    listed_names = {entry.path for entries in found.splits.values() for entry in entries}
    if unlisted := len(captions.keys() - listed_names):
        found.left_out["{} images that no list names are left out."] += unlisted
    return found


_READERS: dict[Form, Callable[[Sequence[Path]], _Annotations]] = {
    "karpathy": _read_karpathy,
    "coco": _read_coco,
    "token": _read_token,
}

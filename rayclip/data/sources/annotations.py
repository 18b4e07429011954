"""Source of image-caption data in its published forms: Karpathy's JSON, COCO's own annotations, Flickr's token files.

Retrieval is reported on Karpathy's splits (Karpathy & Fei-Fei 2015, `caption_datasets.zip`); if a folder holds them,
they take precedence over the publishers' own annotations.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from rayclip.data.sources.base import Record, Source
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
_ANNOTATIONS = ("", "annotations")
_IMAGES = ("val2014", "train2014", "val2017", "train2017", "flickr30k-images", "Flicker8k_Dataset", "images")
_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # restval joins train, as usual
_FLICKR8K_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An image listed in annotations; `name` is relative to the folder of images."""

    name: str
    captions: tuple[str, ...]
    problem: str | None = None


@dataclass
class _Read:
    """Result of reading annotations. `counts` counts what became no record, by the sentence that reports it."""

    splits: dict[str, list[_Entry]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def count(self, sentence: str, number: int = 1) -> None:
        self.counts[sentence] = self.counts.get(sentence, 0) + number


def open_caption_folder(path: Path, name: str) -> Source:
    """Open a folder of images and captions.

    Args:
        path: folder with images and annotations; see `CaptionFolder` for the file names.
        name: name of the data set; if it contains `coco`, `flickr30k` or `flickr8k`, only the annotations of that one
            are used.

    Raises:
        UserError: no such folder; no annotations, unreadable ones, or those of several data sets.
    """
    return CaptionFolder(path, name)


class CaptionFolder(Source):
    """A folder of images, with one of these annotations in it or in its `annotations/`:

    - Karpathy's `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`;
    - COCO's `captions_{train,val}{2017,2014}.json`: of one year, the newest that has a val file;
    - `results_20130124.token` (Flickr30k), `Flickr8k.token.txt` with the lists `Flickr_8k.{train,dev,test}Images.txt`.

    Images are searched where the annotations say, then in folders with the published names, in `images/` and in the
    folder itself. Records are in the annotations' order; captions are stripped and otherwise unchanged. An image that
    is missing, listed twice, without captions, or outside the folder becomes a record with a `problem`; annotations
    that belong to no image are counted in `notes`.

    Raises:
        UserError: see `open_caption_folder`.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}: give the one that holds the images and their captions.")
        self._root = path
        self._form, files = _choose(path, name)
        read = _READERS[self._form](files)
        if not any(read.splits.values()):
            raise UserError(f"{files[0]} tells of no images: give the published file.")
        self._splits = {split: _once(entries) for split, entries in read.splits.items()}
        self._digests = {str(f.relative_to(path)): _digest(f) for f in read.files}
        self.notes = (*read.notes, *(sentence.format(number) for sentence, number in read.counts.items()))

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "form": self._form, "files": self._digests}

    def splits(self) -> dict[str, int | None]:
        return {split: len(entries) for split, entries in self._splits.items()}

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        if split not in self._splits:
            raise UserError(f"{self._root} has no split '{split}': it has {', '.join(self._splits)}.")
        return map(self._record, itertools.islice(self._splits[split], start, None))

    def _record(self, entry: _Entry) -> Record:
        problem = _outside(entry.name)
        if problem is None:
            file = self._find(entry.name)
            if file is None:
                problem = f"there is no image {entry.name}"
            else:
                return Record(
                    path=str(file.relative_to(self._root)),
                    read=file.read_bytes,
                    captions=entry.captions,
                    problem=entry.problem or (None if entry.captions else "the image has no captions"),
                )
        return Record(path=entry.name, read=partial(_refuse, problem), captions=entry.captions, problem=problem)

    def _find(self, name: str) -> Path | None:
        # os.path.isfile returns False, not an error, for names that no file system accepts.
        return next((self._root / p for p in _places(name) if os.path.isfile(self._root / p)), None)


def _places(name: str) -> Sequence[str]:
    """Return the possible places of an image below the folder, best first."""
    if "/" not in name:
        return [f"{folder}/{name}" for folder in _IMAGES] + [name]
    last = name.rpartition("/")[2]
    return [name, f"images/{name}", f"images/{last}", last]


def _outside(name: str) -> str | None:
    """Return why a name from annotations must not be opened; None if it may."""
    if not name:
        return "the annotations name no file"
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        return f"the file name {name!r} leads out of the folder"
    return None


def _refuse(problem: str) -> bytes:
    raise FileNotFoundError(problem)


def _once(entries: Sequence[_Entry]) -> list[_Entry]:
    """Mark repeated images as problems and keep the first: a repeated image would compete with itself in retrieval."""
    seen: set[str] = set()
    result = []
    for e in entries:
        twice = bool(e.name) and e.name in seen
        result.append(_Entry(name=e.name, captions=e.captions, problem="the image is listed twice") if twice else e)
        seen.add(e.name)
    return result


# ------------------------------------------------------------------------------------------------- choosing annotations


def _choose(folder: Path, name: str) -> tuple[Form, list[Path]]:
    """Choose the best available annotations; return their form and files."""
    named = [kind for kind in _FILES if kind in name.lower()]
    kinds = named or list(_FILES)
    found = {
        kind: [
            (form, f) for form, file in _FILES[kind] for f in (folder / a / file for a in _ANNOTATIONS) if f.is_file()
        ]
        for kind in kinds
    }
    there = [kind for kind, files in found.items() if files]
    if not there:
        wanted = [file for kind in kinds for _, file in _FILES[kind]]
        raise UserError(
            f"{folder} holds no captions: none of {', '.join(wanted)} is there or in {folder / 'annotations'}."
        )
    if len(there) > 1:
        raise UserError(
            f"{folder} holds annotations of several data sets ({', '.join(found[k][0][1].name for k in there)}): "
            f"name the data set {' or '.join(there)}, or keep one's annotations."
        )
    files = found[there[0]]
    form = files[0][0]
    return form, [f for other, f in files if other == form]


def _json(file: Path, *lists: str) -> dict[str, Any]:
    """Read a JSON object and check that it holds these lists."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no readable JSON ({str(error)[:120]}): fetch it again.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    for key in lists:
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise UserError(f"{file} has no list '{key}', so it is not what its name says: fetch it again.")
    return value


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text: fetch it again.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- reading the forms


def _text(value: Any) -> str | None:
    """Return a stripped caption; None if it is empty, not text, or not valid UTF-8 (JSON may hold lone surrogates)."""
    if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
        return None
    return value.strip() or None


_NO_TEXT = "{} captions without text are left out."


def _read_karpathy(files: Sequence[Path]) -> _Read:
    file = files[0]
    read = _Read(files=[file])
    for image in _json(file, "images")["images"]:
        split = image.get("split") if isinstance(image, dict) else None
        if not isinstance(split, str) or split not in _KARPATHY_SPLITS:
            read.count("{} entries of " + file.name + " that belong to no known split are left out.")
            continue
        sentences = image.get("sentences")
        raw = sentences if isinstance(sentences, list) else []
        captions = [_text(s.get("raw")) if isinstance(s, dict) else None for s in raw]
        kept = tuple(c for c in captions if c)
        if len(kept) < len(captions):
            read.count(_NO_TEXT, len(captions) - len(kept))
        read.splits.setdefault(_KARPATHY_SPLITS[split], []).append(
            _Entry(name=_joined(image.get("filepath"), image.get("filename")), captions=kept)
        )
    return read


def _joined(folder: Any, name: Any) -> str:
    """Join `filepath/filename`, where the first may be absent; return "" if there is no file name."""
    name = _text(name) or ""
    return f"{folder}/{name}" if name and _text(folder) else name


def _read_coco(files: Sequence[Path]) -> _Read:
    """Read the files of one year: 2014 and 2017 split the same images differently, so using both would mix splits."""
    year = files[0].stem[-4:]
    used = list({f.name: f for f in reversed(files) if f.stem.endswith(year)}.values())
    read = _Read(files=sorted(used))
    for file in read.files:
        split = "val" if "val" in file.stem else "train"
        content = _json(file, "images", "annotations")
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            key = annotation.get("image_id") if isinstance(annotation, dict) else None
            text = _text(annotation.get("caption")) if isinstance(annotation, dict) else None
            if text is None:
                read.count(_NO_TEXT)
            elif not isinstance(key, int | str):
                read.count("{} captions that name no image are left out.")
            else:
                captions.setdefault(key, []).append(text)
        entries = read.splits.setdefault(split, [])
        for image in content["images"]:
            described = image if isinstance(image, dict) else {}
            key = described.get("id")
            own = captions.pop(key, []) if isinstance(key, int | str) else []
            entries.append(_Entry(name=_joined(f"{split}{year}", described.get("file_name")), captions=tuple(own)))
        strangers = sum(map(len, captions.values()))
        if strangers:
            read.count("{} captions of images that " + file.name + " does not list are left out.", strangers)
    if "val" in read.splits:
        read.notes.append(
            f"split 'val' is COCO's own val{year} ({len(read.splits['val'])} images), not Karpathy's 5k test that "
            "papers report on: put dataset_coco.json beside it for that."
        )
    ignored = sorted({f.name for f in files} - {f.name for f in used})
    if ignored:
        read.notes.append(f"{', '.join(ignored)}: of another year, not used.")
    return read


def _read_token(files: Sequence[Path]) -> _Read:
    file = files[0]
    read = _Read(files=[file])
    captions: dict[str, list[str]] = {}
    for line in _lines(file):
        key, tab, sentence = line.partition("\t")
        name, hash_, number = key.rpartition("#")
        if not tab or not hash_ or not number.isdigit() or not name:
            read.count("{} lines of " + file.name + " that are no NAME#NUMBER and sentence are left out.")
            continue
        captions.setdefault(name, []).append(sentence.strip())
    lists = {split: file.parent / name for split, name in _FLICKR8K_LISTS.items() if "8k" in file.name}
    lists = {split: f for split, f in lists.items() if f.is_file()}
    if not lists:
        read.splits["test"] = [_Entry(name=name, captions=tuple(own)) for name, own in captions.items()]
        read.notes.append(
            f"{file.name} has no list of test images beside it, so split 'test' is all {len(captions)} images, not the "
            "1k that papers report on: put Karpathy's JSON beside it for that."
        )
        return read
    for split, f in lists.items():
        read.files.append(f)
        read.splits[split] = [_Entry(name=name, captions=tuple(captions.get(name, ()))) for name in _lines(f)]
    listed = {e.name for entries in read.splits.values() for e in entries}
    unlisted = sum(name not in listed for name in captions)
    if unlisted:
        read.count("{} images that no list names are left out.", unlisted)
    return read


_READERS: dict[Form, Callable[[Sequence[Path]], _Read]] = {
    "karpathy": _read_karpathy,
    "coco": _read_coco,
    "token": _read_token,
}

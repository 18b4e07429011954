"""Source of WebDatasets: CLIP_benchmark's form (`SPLIT/nshards.txt`, `SPLIT/0.tar`, …, `classnames.txt`) or plain tars.

A sample is a run of consecutive members of a tar with the same name up to the first dot: an image with `.cls` (an
integer as text, or a class name) or, in image-caption data, with `.txt` (one caption per line).
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayclip.data.labels import MISSING, explain_labels, with_given_names
from rayclip.data.layout import SPLITS
from rayclip.data.sources.base import Record
from rayclip.data.sources.shards import Shard, Sharded, unreadable
from rayclip.data.spec import Reading
from rayclip.types import UserError

IMAGES = frozenset({"webp", "png", "jpg", "jpeg"})

_TEXT_BYTES = 1 << 20  # largest label or list of captions; larger members are not read
_BLOCK = 512  # bytes in a tar block


class WebDatasetSource(Sharded):
    """Images in tar files, which are read in place and never unpacked.

    Args:
        shards: each split's tar files in order.
        class_names: in label order; empty for image-caption data.
        description: for the manifest.
        reading: label of the first class, and a file of class names.
    """

    def __init__(
        self,
        shards: Mapping[str, Sequence[Shard]],
        class_names: Sequence[str],
        description: Mapping[str, Any],
        reading: Reading = Reading(),
    ) -> None:
        super().__init__(shards, description)
        if reading.image or reading.label:
            raise UserError("a WebDataset has no columns: leave --image-column and --label-column away.")
        self._first = reading.labels_from
        own, given = tuple(class_names), reading.class_names()
        self._number = {text: number for number, text in enumerate(own or given or (), start=self._first)}
        self.class_names = own
        if given is not None:
            self.class_names, note = with_given_names(own, given, str(reading.names))
            self.notes = (note,) if note else ()

    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        keys: set[str] = set()
        number = -1
        for number, sample in enumerate(_samples(shard, path)):
            repeated = sample.key in keys
            keys.add(sample.key)
            if number >= start:
                yield self._record(shard, path, sample, repeated)
        return number + 1

    def _record(self, shard: Shard, path: Path, sample: "_Sample", repeated: bool) -> Record:
        images = [m for m in sample.members if m.extension in IMAGES]
        where = f"{shard.name}/{images[0].name if images else sample.key}"
        problem = None
        if repeated:
            problem = f"the name {sample.key!r} occurs before in {shard.name}"
        elif len(images) != 1:
            problem = f"the sample has {len(images)} images" if images else "the sample has no image"
        read = _range_reader(path, images[0]) if images else unreadable("the sample has no image")
        if self.class_names:
            label, label_problem = self._label(shard, path, sample)
            return Record(path=where, read=read, label=label, problem=problem or label_problem)
        captions, caption_problem = _captions(path, sample)
        return Record(path=where, read=read, captions=captions, problem=problem or caption_problem)

    def _label(self, shard: Shard, path: Path, sample: "_Sample") -> tuple[int | None, str | None]:
        text, problem = _text(path, sample, "cls", "label")
        if text is None:
            return None, problem
        text, where = text.strip(), f"{shard.name}/{sample.key}"
        number = self._number.get(text)
        if number is None:
            if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
                return None, f"the label {text[:40]!r} is no number and no class name"
            number = int(text)
        if number == MISSING:
            return None, "the sample has no label (-1)"
        wrong = explain_labels([number], len(self.class_names), self._first)
        if wrong is not None:
            # An error, not a rejection: if this label does not fit, others may be shifted.
            remedy = "name every class with --class-names FILE, a name a line in label order, or correct the labels"
            if self._first == 0 and number == len(self.class_names):
                remedy = f"if its labels are counted from 1, add --labels-from 1; else {remedy}"
            raise UserError(
                f"{where} has the label {number}, but there are {len(self.class_names)} class names: {remedy}."
            )
        return number - self._first, None


def open_webdataset(
    place: Path, class_names: Sequence[str] | None = None, reading: Reading = Reading()
) -> WebDatasetSource:
    """Open a WebDataset: a folder in CLIP_benchmark's form, or one with other tars.

    Args:
        place: folder with `train`, `val` or `test`, each with `nshards.txt`; or with `.tar` files in such folders or
            named after their split (`train-000000.tar`; others form the split `test`); or one `.tar` file.
            `classnames.txt` is beside them, unless there are captions.
        class_names: used if there is no `classnames.txt`; empty to read captions, even if there are labels.
        reading: see `WebDatasetSource`.

    Raises:
        UserError: no such folder, no split in it, a tar is missing, or `nshards.txt` or `classnames.txt` is invalid.
    """
    if not place.exists():
        raise UserError(f"no such folder: {place}.")
    folder = place if place.is_dir() else place.parent
    found = _tars(place)
    if not found:
        raise UserError(
            f"folder {folder} holds no WebDataset: it needs test/nshards.txt, test/0.tar and so on, or test-000000.tar."
        )
    shards = {}
    digest = hashlib.sha256()
    for split, paths in found.items():
        shards[split] = [Shard.local(p, p.relative_to(folder).as_posix()) for p in paths]
        digest.update(json.dumps([split, [p.stat().st_size for p in paths]]).encode())
    captions = class_names is not None and not class_names
    if (folder / "classnames.txt").is_file() and not captions:
        class_names = class_list((folder / "classnames.txt").read_bytes(), f"{folder / 'classnames.txt'}")
    if not class_names and not captions and reading.names is None and _has_labels(next(iter(shards.values()))[0]):
        raise UserError(
            f"{folder} has labels and no classnames.txt: give --class-names FILE, a name a line in label order."
        )
    digest.update(json.dumps(list(class_names or ())).encode())
    for of_split in shards.values():
        for shard in of_split:
            digest.update(_head(shard.fetch()))
    description = {"kind": "webdataset", "content": digest.hexdigest()[:16], **reading.decisive()}
    return WebDatasetSource(shards, class_names or (), description, reading)


def _tars(place: Path) -> dict[str, list[Path]]:
    """Find the tar files of each split, in order."""
    if place.is_file():
        return {_split_told(place.stem): [place]}
    found: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            listed = place / name / "nshards.txt"
            if listed.is_file():
                paths = [place / name / f"{i}.tar" for i in range(shard_count(listed.read_bytes(), f"{listed}"))]
                missing = next((p for p in paths if not p.is_file()), None)
                if missing:
                    raise UserError(f"{listed} says {len(paths)} files but {missing} is missing: fetch it.")
                found[split] = paths
    if found:
        return found
    for split, names in SPLITS.items():
        paths = sorted(tar for name in names for tar in (place / name).glob("*.tar"))
        found |= {split: paths} if paths else {}
    if found:
        return found
    for tar in sorted(place.glob("*.tar")):
        found.setdefault(_split_told(tar.stem), []).append(tar)
    return found


def _split_told(stem: str) -> str:
    """Return the split that a file's name indicates, else `test`."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((own for own, spellings in SPLITS.items() if not set(spellings).isdisjoint(words)), "test")


def shard_count(text: bytes, where: str) -> int:
    """Parse the number in `nshards.txt`. Raises `UserError`."""
    if not re.fullmatch(rb"\s*[1-9]\d{0,6}\s*", text):
        raise UserError(f"{where} must hold the number of tar files and nothing else: fetch it again.")
    return int(text)


def class_list(text: bytes, where: str) -> tuple[str, ...]:
    """Parse the lines of `classnames.txt`. Raises `UserError`."""
    try:
        names = tuple(line.strip() for line in text.decode("utf-8-sig").strip().split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8 text: fetch it again.") from error
    if "" in names:
        raise UserError(f"{where} has an empty line, {names.index('') + 1}: it must have one class name a line.")
    return names


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A file within a tar: a name for people, and the offset and size of its bytes. `problem` says why it has no bytes
    there (a link or a device)."""

    name: str
    extension: str
    offset: int
    size: int
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class _Sample:
    key: str
    members: list[_Member]


def _samples(shard: Shard, path: Path) -> Iterator[_Sample]:
    """Yield the samples of a tar, reading headers only. A sample is yielded once the header after it is valid."""
    sample: _Sample | None = None
    for key, member in _members(shard, path):
        if sample and sample.key != key:
            yield sample
            sample = None
        if sample is None:
            sample = _Sample(key=key, members=[])
        sample.members.append(member)
    if sample:
        yield sample


def _members(shard: Shard, path: Path) -> Iterator[tuple[str, _Member]]:
    """Yield each file of a tar with its sample's key, without reading images."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            before = -1
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
                if info.size < 0 or tar.offset <= before:
                    raise tarfile.ReadError("a member of negative size")
                before = tar.offset
                # Names may be any bytes: those that are not text are replaced, so that names can be stored.
                name = info.name.encode("utf-8", "replace").decode()
                folder, slash, base = name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if info.isdir() or not stem or not dot:  # not part of a sample, such as macOS's `._0.jpg`
                    continue
                plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and info.sparse is None
                yield (
                    folder + slash + stem,
                    _Member(
                        name=name,
                        extension=extension.lower(),
                        offset=info.offset_data,
                        size=info.size,
                        problem=None if plain else f"{name} is a link or a device, no file",
                    ),
                )
            # `next` stops at anything that is not a header, but a complete tar ends with a block of zeros.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("its end is missing")
    except FileNotFoundError as error:
        raise UserError(f"no such data file: {path}.") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise shard.damaged(path, error) from error


def _range_reader(path: Path, member: _Member) -> Callable[[], bytes]:
    """Return a function that reads a member on demand, so that queued samples take no memory."""

    def read() -> bytes:
        if member.problem:
            raise ValueError(member.problem)
        if not member.size:
            raise ValueError(f"{member.name} is empty")
        with path.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        if len(data) != member.size:
            raise OSError(f"{member.name} is cut off")
        return data

    return read


def _has_labels(shard: Shard) -> bool:
    """Return whether the first sample of a tar has a label."""
    first = next(_samples(shard, shard.fetch()), None)
    return first is not None and any(m.extension == "cls" for m in first.members)


def _text(path: Path, sample: _Sample, extension: str, what: str) -> tuple[str | None, str | None]:
    """Return the text of a sample's only member with this extension, or the problem with it."""
    members = [m for m in sample.members if m.extension == extension]
    if len(members) != 1:
        return None, f"the sample has {len(members) if members else 'no'} {what} files (.{extension})"
    member = members[0]
    if member.problem or member.size > _TEXT_BYTES:
        return None, member.problem or f"{member.name} is too large for a {what}"
    try:
        return _range_reader(path, member)().decode() if member.size else "", None
    except UnicodeDecodeError:
        return None, f"{member.name} is no UTF-8 text"


def _captions(path: Path, sample: _Sample) -> tuple[tuple[str, ...], str | None]:
    text, problem = _text(path, sample, "txt", "caption")
    if text is None:
        return (), problem
    captions = tuple(line.strip() for line in text.split("\n") if line.strip())
    return captions, None if captions else "the sample has no caption"


def _head(path: Path) -> bytes:
    """Return a file's first and last MiB, which with its size identify the data set."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        return head + file.read()

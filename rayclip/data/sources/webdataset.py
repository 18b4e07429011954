"""Source of WebDatasets: CLIP_benchmark's form (`SPLIT/nshards.txt`, `SPLIT/0.tar`, …, `classnames.txt`) or plain tars.

A sample is a run of consecutive members of a tar with the same name up to the first dot: an image with `.cls` (an
integer as text, or a class name) or, in image-caption data, with `.txt` (one caption per line).
"""

import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayclip.data.labels import MISSING, check_labels, with_given_names
from rayclip.data.layout import SPLITS, split_named_in
from rayclip.data.sources.base import Record
from rayclip.data.sources.shards import Shard, ShardedSource, unreadable
from rayclip.data.spec import Reading
from rayclip.types import UserError

IMAGES = frozenset({"webp", "png", "jpg", "jpeg"})

_TEXT_BYTES = 1 << 20  # largest label or list of captions; larger members are not read
_BLOCK = 512  # bytes in a tar block


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A file within a tar: the key of its sample, its place, and the `problem` if it has no bytes there (a link)."""

    key: str
    name: str
    extension: str
    offset: int
    size: int
    problem: str | None

    def read(self, path: Path) -> bytes:
        """Read its bytes from the tar at `path`. Raises `ValueError`, `OSError`."""
        if self.problem:
            raise ValueError(self.problem)
        if not self.size:
            raise ValueError(f"{self.name} is empty")
        with path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.name} is cut off")
        return data


class WebDatasetSource(ShardedSource):
    """Images in tar files, which are read in place and never unpacked. `class_names` are in label order; empty for
    image-caption data."""

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
        self.class_names, given = tuple(class_names), reading.class_names()
        self._number = {text: number for number, text in enumerate(self.class_names or given or (), self._first)}
        if given is not None:
            self.class_names, note = with_given_names(self.class_names, given, str(reading.names))
            self.notes = (note,) if note else ()

    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        keys: set[str] = set()
        number = -1
        for number, members in enumerate(_samples(shard, path)):
            key = members[0].key
            if number >= start:
                yield self._record(shard, path, members, key in keys)
            keys.add(key)
        return number + 1

    def _record(self, shard: Shard, path: Path, members: list[_Member], repeated: bool) -> Record:
        images, key = [m for m in members if m.extension in IMAGES], members[0].key
        problem = None
        if repeated:
            problem = f"the name {key!r} occurs before in {shard.name}"
        elif len(images) != 1:
            problem = f"the sample has {len(images)} images" if images else "the sample has no image"
        where = f"{shard.name}/{images[0].name if images else key}"
        read = partial(images[0].read, path) if images else unreadable("the sample has no image")
        label: int | None = None
        captions: tuple[str, ...] = ()
        try:
            if self.class_names:
                label = self._label(f"{shard.name}/{key}", _text(path, members, "cls", "label"))
            else:
                lines = map(str.strip, _text(path, members, "txt", "caption").split("\n"))
                captions = tuple(line for line in lines if line)
                if not captions:
                    raise ValueError("the sample has no caption")
        except ValueError as error:
            problem = problem or str(error)
        return Record(path=where, read=read, label=label, captions=captions, problem=problem)

    def _label(self, where: str, text: str) -> int:
        text = text.strip()
        number = self._number.get(text)
        if number is None:
            if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
                raise ValueError(f"the label {text[:40]!r} is no number and no class name")
            number = int(text)
        if number == MISSING:
            raise ValueError("the sample has no label (-1)")
        check_labels(where, [number], len(self.class_names), self._first, "if so, add --labels-from 1")
        return number - self._first


def open_webdataset(place: Path, captions: bool = False, reading: Reading = Reading()) -> WebDatasetSource:
    """Open a WebDataset: a folder in CLIP_benchmark's form, or one with other tars.

    Args:
        place: folder with `train`, `val` or `test`, each with `nshards.txt`; or with `.tar` files in such folders or
            named after their split (`train-000000.tar`; others form the split `test`); or one `.tar` file.
        captions: whether to read captions even if there are labels.

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
    shards = {s: [Shard.local(p, p.relative_to(folder).as_posix()) for p in paths] for s, paths in found.items()}
    listed = folder / "classnames.txt"
    class_names = class_list(listed.read_bytes(), f"{listed}") if listed.is_file() and not captions else ()
    if not class_names and not captions and reading.names is None and _has_labels(next(iter(shards.values()))[0]):
        raise UserError(
            f"{folder} has labels and no classnames.txt: give --class-names FILE, one name per line in label order."
        )
    digest = hashlib.sha256()
    for split, paths in found.items():
        digest.update(json.dumps([split, [p.stat().st_size for p in paths]]).encode())
    digest.update(json.dumps(class_names).encode())
    for path in itertools.chain(*found.values()):
        digest.update(_edges(path))
    description = {"kind": "webdataset", "content": digest.hexdigest()[:16], **reading.decisive()}
    return WebDatasetSource(shards, class_names, description, reading)


def _tars(place: Path) -> dict[str, list[Path]]:
    """Find the tar files of each split, in order."""
    if place.is_file():
        return {split_named_in(place.stem) or "test": [place]}
    counted: dict[str, list[Path]] = {}
    in_folders: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        for folder in (place / name for name in names):
            listed = folder / "nshards.txt"
            if listed.is_file():
                names_there = counted_tars(listed.read_bytes(), f"{listed}", {p.name for p in folder.glob("*.tar")})
                counted[split] = [folder / name for name in names_there]
        if paths := sorted(tar for name in names for tar in (place / name).glob("*.tar")):
            in_folders[split] = paths
    named: dict[str, list[Path]] = {}
    for tar in sorted(place.glob("*.tar")):
        named.setdefault(split_named_in(tar.stem) or "test", []).append(tar)
    return counted or in_folders or named


def counted_tars(text: bytes, where: str, there: Collection[str]) -> list[str]:
    """Return the names of the tars that `nshards.txt` counts. Raises `UserError` if one is missing."""
    if not re.fullmatch(rb"\s*[1-9]\d{0,6}\s*", text):
        raise UserError(f"{where} must hold the number of tar files and nothing else: fetch it again.")
    names = [f"{i}.tar" for i in range(int(text))]
    if missing := next((name for name in names if name not in there), None):
        raise UserError(
            f"{where} says {len(names)} files but {missing} is missing: fetch it, or take another revision."
        )
    return names


def class_list(text: bytes, where: str) -> tuple[str, ...]:
    """Parse the lines of `classnames.txt`. Raises `UserError`."""
    try:
        names = tuple(line.strip() for line in text.decode("utf-8-sig").strip().split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8 text: fetch it again.") from error
    if "" in names:
        raise UserError(f"{where} has an empty line, {names.index('') + 1}: it must have one class name per line.")
    return names


def _samples(shard: Shard, path: Path) -> Iterator[list[_Member]]:
    """Yield the members of each sample, reading headers only. A sample is yielded once the header after it is valid."""
    for _, members in itertools.groupby(_members(shard, path), lambda member: member.key):
        yield list(members)


def _members(shard: Shard, path: Path) -> Iterator[_Member]:
    """Yield each file of a tar, without reading images."""
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
                yield _Member(
                    key=folder + slash + stem,
                    name=name,
                    extension=extension.lower(),
                    offset=info.offset_data,
                    size=info.size,
                    problem=None if plain else f"{name} is a link or a device, no file",
                )
            # `next` stops at anything that is not a header, but a complete tar ends with a block of zeros.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("its end is missing")
    except FileNotFoundError as error:
        raise UserError(f"no such data file: {path}.") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise shard.damaged(path, error) from error


def _has_labels(shard: Shard) -> bool:
    """Return whether the first sample of a tar has a label."""
    return any(member.extension == "cls" for member in next(_samples(shard, shard.fetch()), []))


def _text(path: Path, members: Sequence[_Member], extension: str, what: str) -> str:
    """Return the text of a sample's only member with this extension. Raises `ValueError` with the problem."""
    found = [m for m in members if m.extension == extension]
    if len(found) != 1:
        raise ValueError(f"the sample has {len(found) if found else 'no'} {what} files (.{extension})")
    member = found[0]
    if member.problem or member.size > _TEXT_BYTES:
        raise ValueError(member.problem or f"{member.name} is too large for a {what}")
    try:
        return member.read(path).decode() if member.size else ""
    except UnicodeDecodeError:
        raise ValueError(f"{member.name} is no UTF-8 text") from None


def _edges(path: Path) -> bytes:
    """Return a file's first and last MiB, which with its size identify the data set."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        return head + file.read()

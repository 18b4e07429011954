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
from pathlib import Path
from typing import Any, NamedTuple

from rayclip.data.labels import MISSING, Labels, Reading, read_class_names
from rayclip.data.layout import SPLITS, split_named_in
from rayclip.data.sources.base import Record, Shard, ShardedSource
from rayclip.data.tables import edges
from rayclip.types import UserError

_IMAGES = frozenset({"webp", "png", "jpg", "jpeg"})
_TEXT_BYTES = 1 << 20  # largest label or list of captions; larger members are not read
_BLOCK = 512  # bytes in a tar block


class _Member(NamedTuple):
    """A file within the tar `path`: the key of its sample, its place, and the `problem` if it has no bytes there."""

    path: Path
    key: str
    name: str
    extension: str
    offset: int
    size: int
    problem: str | None

    def read(self) -> bytes:
        """Read its bytes. Raises `ValueError`, `OSError`."""
        if self.problem:
            raise ValueError(self.problem)
        if not self.size:
            raise ValueError(f"{self.name} is empty")
        with self.path.open("rb") as file:
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
        class_names: tuple[str, ...],
        description: Mapping[str, Any],
        reading: Reading = Reading(),
    ) -> None:
        super().__init__(shards, description)
        if reading.image or reading.label:
            raise UserError("a WebDataset has no columns: leave --image-column and --label-column away.")
        self._labels = Labels.choose(class_names, reading, from_1="if so, add --labels-from 1")
        self.class_names, self.notes = self._labels.class_names, self._labels.notes

    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        keys: set[str] = set()
        number = -1
        for number, (key, members) in enumerate(_samples(shard, path)):
            if number >= start:
                yield self._record(shard, key, members, key in keys)
            keys.add(key)
        return number + 1

    def _record(self, shard: Shard, key: str, members: list[_Member], repeated: bool) -> Record:
        images = [m for m in members if m.extension in _IMAGES]
        where, problem = f"{shard.name}/{images[0].name if images else key}", None
        label: int | None = None
        captions: tuple[str, ...] = ()
        try:
            if self.class_names:
                label = self._label(f"{shard.name}/{key}", _text(members, "cls", "label").strip())
            else:
                lines = map(str.strip, _text(members, "txt", "caption").split("\n"))
                captions = tuple(line for line in lines if line)
                if not captions:
                    raise ValueError("the sample has no caption")
        except ValueError as error:
            problem = str(error)
        if len(images) != 1:
            problem = f"the sample has {len(images)} images" if images else "the sample has no image"
        if repeated:
            problem = f"the name {key!r} occurs before in {shard.name}"
        if not images:
            return Record(path=where, label=label, captions=captions, problem=problem)
        return Record(path=where, read=images[0].read, label=label, captions=captions, problem=problem)

    def _label(self, where: str, text: str) -> int:
        number = self._labels.number(text)
        if number == MISSING:
            raise ValueError("the sample has no label (-1)")
        self._labels.check(where, [number])
        return number - self._labels.first


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
    class_names = read_class_names(listed, plain=True) if listed.is_file() and not captions else ()
    if not class_names and not captions and reading.names is None:
        first = next(iter(shards.values()))[0]
        _, members = next(_samples(first, first.fetch()), ("", []))
        if any(member.extension == "cls" for member in members):
            raise UserError(
                f"{folder} has labels and no classnames.txt: give --class-names FILE, one name per line in label order."
            )
    digest = hashlib.sha256()
    for split, paths in found.items():
        digest.update(json.dumps([split, [p.stat().st_size for p in paths]]).encode())
    digest.update(json.dumps(class_names).encode())
    for path in itertools.chain(*found.values()):
        digest.update(edges(path))
    description = {"kind": "webdataset", "content": digest.hexdigest()[:16], **reading.decisive()}
    return WebDatasetSource(shards, class_names, description, reading)


def _tars(place: Path) -> dict[str, list[Path]]:
    """Find the tar files of each split, in order."""
    if place.is_file():
        return {split_named_in(place.stem) or "test": [place]}
    counted: dict[str, list[Path]] = {}
    in_folders: dict[str, list[Path]] = {}
    named: dict[str, list[Path]] = {}
    for split, spellings in SPLITS.items():
        for folder in (place / spelling for spelling in spellings):
            tars = sorted(folder.glob("*.tar"))
            if tars:
                in_folders.setdefault(split, []).extend(tars)
            if (listed := folder / "nshards.txt").is_file():
                counted[split] = [folder / name for name in counted_tars(listed, str(listed), {p.name for p in tars})]
    for tar in sorted(place.glob("*.tar")):
        named.setdefault(split_named_in(tar.stem) or "test", []).append(tar)
    return counted or in_folders or named


def counted_tars(listed: Path, where: str, there: Collection[str]) -> list[str]:
    """Return the names of the tars that `nshards.txt` counts. Raises `UserError` if one is missing."""
    text = listed.read_bytes()
    if not re.fullmatch(rb"\s*[1-9]\d{0,6}\s*", text):
        raise UserError(f"{where} must hold the number of tar files and nothing else: fetch it again.")
    names = [f"{i}.tar" for i in range(int(text))]
    if missing := next((name for name in names if name not in there), None):
        raise UserError(
            f"{where} says {len(names)} files but {missing} is missing: fetch it, or take another revision."
        )
    return names


def _samples(shard: Shard, path: Path) -> Iterator[tuple[str, list[_Member]]]:
    """Yield the key and members of each sample, without reading images, once the header after it is valid."""
    for key, members in itertools.groupby(_members(shard, path), lambda member: member.key):
        yield key, list(members)


def _members(shard: Shard, path: Path) -> Iterator[_Member]:
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
                problem = None if plain else f"{name} is a link or a device, no file"
                key = folder + slash + stem
                yield _Member(path, key, name, extension.lower(), info.offset_data, info.size, problem)
            # `next` stops at anything that is not a header, but a complete tar ends with a block of zeros.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("its end is missing")
    except FileNotFoundError as error:
        raise UserError(f"no such data file: {path}.") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise shard.damaged(path, error) from error


def _text(members: Sequence[_Member], extension: str, what: str) -> str:
    """Return the text of a sample's only member with this extension. Raises `ValueError` with the problem."""
    found = [m for m in members if m.extension == extension]
    if len(found) != 1:
        raise ValueError(f"the sample has {len(found) if found else 'no'} {what} files (.{extension})")
    member = found[0]
    if member.problem or member.size > _TEXT_BYTES:
        raise ValueError(member.problem or f"{member.name} is too large for a {what}")
    try:
        return member.read().decode() if member.size else ""
    except UnicodeDecodeError:
        raise ValueError(f"{member.name} is no UTF-8 text") from None

"""`Source`, the interface of all sources of images, and its two kinds: single image files, and files of many images."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rayclip.types import UserError

_Split = TypeVar("_Split")


def _no_image() -> bytes:
    raise ValueError("there is no image")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample of a source.

    Attributes:
        path: its place in the source, for people; stored beside the image.
        read: returns the encoded image file. Called on another thread, and only without a `problem`; may raise
            `OSError` or `ValueError`, which sets the sample aside with that reason.
        label: index into the source's class names; None in image-caption data.
        captions: captions, in image-caption data.
        problem: why the sample cannot be used although its image may be valid, such as a missing label.
    """

    path: str
    read: Callable[[], bytes] = field(default=_no_image, repr=False)
    label: int | None = None
    captions: tuple[str, ...] = ()
    problem: str | None = None


class Source(ABC):
    """A source of images. Opening one reads names and annotations only; images are read record by record.

    Attributes:
        class_names: in label order, in the source's own spelling; empty for image-caption data.
        label_keys: in label order, keys that identify a class regardless of spelling (WordNet ids); empty if there are
            none.
        notes: remarks for users (merged folders, empty classes), one sentence each.
    """

    class_names: tuple[str, ...] = ()
    label_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the source for the manifest, as JSON values. Equal descriptions mean the same records."""

    @abstractmethod
    def splits(self) -> dict[str, int | None]:
        """Return the splits by our names (`train`, `val`, `test`), each with its number of records, None if unknown."""

    @abstractmethod
    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        """Yield a split's records from number `start` on, always in the same order. None is left out: an unusable
        sample is a record with a `problem`."""


def choose_split(splits: Mapping[str, _Split], split: str, where: object = "the data set") -> _Split:
    """Return one of a source's splits. Raises `UserError` if it has no such split."""
    if split not in splits:
        raise UserError(f"{where} has no split '{split}': it has {', '.join(splits)}.")
    return splits[split]


class Entry(NamedTuple):
    """One image file: its `path` relative to the source's folder, with `/`; the rest as in `Record`."""

    path: str
    label: int | None = None
    problem: str | None = None
    captions: tuple[str, ...] = ()


class FileSource(Source):
    """Image files below `root`, listed when the source is opened, opened on demand and passed on byte for byte."""

    def __init__(
        self,
        root: Path,
        entries: Mapping[str, Sequence[Any]],
        description: Mapping[str, Any],
        class_names: Sequence[str] = (),
        label_keys: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self._root, self._entries, self._description = root, entries, description
        self.class_names, self.label_keys, self.notes = tuple(class_names), tuple(label_keys), tuple(notes)

    def describe(self) -> dict[str, Any]:
        return dict(self._description)

    def splits(self) -> dict[str, int | None]:
        return {split: len(entries) for split, entries in self._entries.items()}

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        entries = choose_split(self._entries, split, self._root)
        return (self._record(entries[i]) for i in range(start, len(entries)))

    def _record(self, entry: Any) -> Record:
        path, label, problem, captions = entry
        read = (self._root / path).read_bytes
        return Record(path=readable(path), read=read, label=label, captions=captions, problem=problem)


def describe_files(root: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Describe a split by the names, labels and sizes of its files, which are not read."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return -1

    parts = (f"{e.path}\t{e.label}\t{e.problem}\t{size(root / e.path)}" for e in entries)
    return {"records": len(entries), "digest": digest(parts)}


def digest(parts: Iterable[str]) -> str:
    """Hash a sequence of strings to 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()[:16]


def readable(path: str) -> str:
    """Replace bytes that are not UTF-8 in a path, so that it can be stored and printed."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of many images.

    Attributes:
        name: for messages; never an absolute path.
        fetch: returns its local path, downloading it first if needed. May raise `UserError`.
        cached: returns its local path; None if it would have to be fetched.
        remote: whether the local file is a copy that may be deleted and fetched again.
    """

    name: str
    fetch: Callable[[], Path] = field(repr=False)
    cached: Callable[[], Path | None] = field(repr=False)
    remote: bool = False

    @classmethod
    def local(cls, path: Path, name: str) -> "Shard":
        return cls(name=name, fetch=lambda: path, cached=lambda: path)

    def damaged(self, path: Path, why: object) -> UserError:
        reason = (str(why) or type(why).__name__).splitlines()[0].rstrip(".")
        # In the hub's cache `path` is a link: its target has to be deleted, or only the link would be restored.
        remedy = f"delete {path.resolve()} and run again" if self.remote else f"fetch {path} again"
        return UserError(f"{self.name} is cut off or damaged ({reason}): {remedy}.")


class ShardedSource(Source):
    """A source whose splits are lists of shards, fetched and read one after another."""

    def __init__(self, shards: Mapping[str, Sequence[Shard]], description: Mapping[str, Any]) -> None:
        self._shards, self._description = shards, description

    def describe(self) -> dict[str, Any]:
        return dict(self._description)

    def splits(self) -> dict[str, int | None]:
        counted: dict[str, int | None] = {}
        for split, shards in self._shards.items():
            sizes = [self._count(shard) for shard in shards]
            counted[split] = None if None in sizes else sum(size or 0 for size in sizes)
        return counted

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        """See `Source`. Shards before `start` whose size is known are neither fetched nor opened."""
        return self._records(choose_split(self._shards, split), start)

    def _records(self, shards: Sequence[Shard], start: int) -> Iterator[Record]:
        for shard in shards:
            size = self._count(shard) if start else None
            if size is None or size > start:
                size = yield from self._read(shard, shard.fetch(), start)
            start = max(0, start - size)

    def _count(self, shard: Shard) -> int | None:
        """Return the number of a shard's records if it is quick to find out without fetching the shard, else None."""
        return None

    @abstractmethod
    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        """Yield a shard's records from number `start` on; return its total number of records. Raises `UserError`."""

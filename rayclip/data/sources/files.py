"""Sources of image files below one folder, all listed when the source is opened."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rayclip.data.sources.base import Record, Source, choose_split


class Entry(NamedTuple):
    """One image file.

    Attributes:
        path: relative to the source's folder, with `/`.
        label: index into the source's class names, None if it has none.
        problem: why the sample cannot be used, None if it can.
        captions: its captions, in image-caption data.
    """

    path: str
    label: int | None = None
    problem: str | None = None
    captions: tuple[str, ...] = ()


class FileSource(Source):
    """Image files below `root`, split by split; files are opened on demand and passed on byte for byte."""

    def __init__(self, root: Path, entries: Mapping[str, Any]) -> None:
        self._root = root
        self._entries: dict[str, Any] = dict(entries)

    def splits(self) -> dict[str, int | None]:
        return {split: len(entries) for split, entries in self._entries.items()}

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        entries = choose_split(self._entries, split, str(self._root))
        return (self._record(split, i) for i in range(start, len(entries)))

    def _record(self, split: str, i: int) -> Record:
        entry = self._entries[split][i]
        return Record(
            path=readable(entry.path),
            read=(self._root / entry.path).read_bytes,
            label=entry.label,
            captions=entry.captions,
            problem=entry.problem,
        )

    def _describe_split(self, split: str) -> dict[str, Any]:
        """Describe a split by the names, labels and sizes of its files, which are not read."""
        entries = self._entries[split]
        parts = (f"{e.path}\t{e.label}\t{e.problem}\t{_size(self._root / e.path)}" for e in entries)
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1

"""Image files of a folder as records: what torchvision's file sets and plain folders share."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rayclip.data.sources.base import Record


class Entry(NamedTuple):
    """One image file.

    Attributes:
        path: below the source's folder, with `/`.
        label: index into the source's class names, where it has one.
        problem: why the sample cannot be used.
    """

    path: str
    label: int | None
    problem: str | None = None


def file_records(root: Path, entries: Sequence[Entry], start: int) -> Iterator[Record]:
    """The entries from number `start` on; the files are opened when they are read, and given byte for byte."""
    for i in range(start, len(entries)):
        entry = entries[i]
        yield Record(
            path=readable(entry.path),
            read=(root / entry.path).read_bytes,
            label=entry.label,
            problem=entry.problem,
        )


def digest(parts: Iterable[str]) -> str:
    """16 hexadecimal digits that name a sequence of strings."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()[:16]


def listing_digest(root: Path, entries: Iterable[Entry]) -> str:
    """A digest of file names, labels and file sizes; the files themselves are not read."""
    return digest(f"{entry.path}\t{entry.label}\t{entry.problem}\t{_size(root / entry.path)}" for entry in entries)


def readable(path: str) -> str:
    """The path with the bytes that are no UTF-8 replaced: it is stored and printed."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1

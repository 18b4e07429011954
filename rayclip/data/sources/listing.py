"""Turn image files of a folder into records; shared by torchvision's file-based data sets and plain folders."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rayclip.data.sources.base import Record


class Entry(NamedTuple):
    """One image file.

    Attributes:
        path: relative to the source's folder, with `/`.
        label: index into the source's class names, None if it has none.
        problem: why the sample cannot be used, None if it can.
    """

    path: str
    label: int | None
    problem: str | None = None


def file_records(root: Path, entries: Sequence[Entry], start: int) -> Iterator[Record]:
    """Yield the entries from number `start` on as records; files are opened on demand and passed on byte for byte."""
    for i in range(start, len(entries)):
        entry = entries[i]
        yield Record(
            path=readable(entry.path),
            read=(root / entry.path).read_bytes,
            label=entry.label,
            problem=entry.problem,
        )


def digest(parts: Iterable[str]) -> str:
    """Hash a sequence of strings to 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()[:16]


def listing_digest(root: Path, entries: Iterable[Entry]) -> str:
    """Hash file names, labels and file sizes; the files themselves are not read."""
    return digest(f"{entry.path}\t{entry.label}\t{entry.problem}\t{_size(root / entry.path)}" for entry in entries)


def readable(path: str) -> str:
    """Replace bytes that are not UTF-8 in a path, so that it can be stored and printed."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1

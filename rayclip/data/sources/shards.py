"""Base of sources made of files that are read one after another and fetched only when they are needed."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayclip.data.sources.base import Record, Source, choose_split
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a source.

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
        """Return the shard of a file on this machine."""
        return cls(name=name, fetch=lambda: path, cached=lambda: path)

    def damaged(self, path: Path, why: object) -> UserError:
        """Return the error for a file that is truncated or damaged."""
        reason = (str(why) or type(why).__name__).splitlines()[0].rstrip(".")
        # In the hub's cache `path` is a link: its target has to be deleted, or only the link would be restored.
        remedy = f"delete {path.resolve()} and run again" if self.remote else f"fetch {path} again"
        return UserError(f"{self.name} is cut off or damaged ({reason}): {remedy}.")


class ShardedSource(Source):
    """A source whose splits are lists of shards."""

    def __init__(self, shards: Mapping[str, Sequence[Shard]], description: Mapping[str, Any]) -> None:
        self._shards = {split: tuple(of_split) for split, of_split in shards.items()}
        self._sizes: dict[tuple[str, int], int] = {}  # records of the shards that were counted or read to the end
        self._description = dict(description)

    def describe(self) -> dict[str, Any]:
        return dict(self._description)

    def splits(self) -> dict[str, int | None]:
        counted: dict[str, int | None] = {}
        for split, shards in self._shards.items():
            sizes = [self._size(split, i) for i in range(len(shards))]
            counted[split] = None if None in sizes else sum(s for s in sizes if s is not None)
        return counted

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        """See `Source`. Shards before `start` whose size is known are neither fetched nor opened."""
        return self._records(choose_split(self._shards, split, "the data set"), split, start)

    def _records(self, shards: Sequence[Shard], split: str, start: int) -> Iterator[Record]:
        for i, shard in enumerate(shards):
            size = self._size(split, i) if start else None
            if size is None or size > start:
                size = self._sizes[split, i] = yield from self._read(shard, shard.fetch(), start)
            start = max(0, start - size)

    def _size(self, split: str, i: int) -> int | None:
        if (split, i) not in self._sizes:
            size = self._count(self._shards[split][i])
            if size is None:
                return None
            self._sizes[split, i] = size
        return self._sizes[split, i]

    def _count(self, shard: Shard) -> int | None:
        """Return the number of a shard's records if it is quick to find out without fetching the shard, else None."""
        return None

    @abstractmethod
    def _read(self, shard: Shard, path: Path, start: int) -> Generator[Record, None, int]:
        """Yield a shard's records from number `start` on; return its total number of records. Raises `UserError`."""


def unreadable(reason: str) -> Callable[[], bytes]:
    """Return a `read` function for a record without an image; it raises a `ValueError` with the reason."""

    def read() -> bytes:
        raise ValueError(reason)

    return read

"""`Source`, the interface of all sources of images: records in a fixed order, each read on demand."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample of a source.

    Attributes:
        path: its place in the source, for people; stored beside the image.
        read: returns the encoded image file. Called on another thread; may raise `OSError` or `ValueError`, which sets
            the sample aside with that reason.
        label: index into the source's class names; None in image-caption data.
        captions: captions, in image-caption data.
        problem: why the sample cannot be used although its image may be valid, such as a missing label.
    """

    path: str
    read: Callable[[], bytes] = field(repr=False)
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


_Split = TypeVar("_Split")


def choose_split(splits: Mapping[str, _Split], split: str, where: str) -> _Split:
    """Return one of a source's splits. Raises `UserError` if it has no such split."""
    if split not in splits:
        raise UserError(f"{where} has no split '{split}': it has {', '.join(splits)}.")
    return splits[split]

"""What a source of images is: records in a fixed order, each read when its turn comes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as its source holds it.

    Attributes:
        path: where in the source, for people; kept beside the image.
        read: the encoded image file. Called on another thread; may raise `OSError` or `ValueError`, which sets the
            sample aside with that reason.
        label: index into the source's class names; None in image-caption data.
        captions: of image-caption data.
        problem: why the sample cannot be used although its image may be fine, such as a missing label.
    """

    path: str
    read: Callable[[], bytes] = field(repr=False)
    label: int | None = None
    captions: tuple[str, ...] = ()
    problem: str | None = None


class Source(ABC):
    """Images somewhere. Opening one looks at names and annotations only; images are read record by record.

    Attributes:
        class_names: in label order, in the source's own spelling; empty for image-caption data.
        label_keys: in label order, what identifies a class whatever its spelling (WordNet ids); empty where there is
            no such thing.
        notes: what a person should know (merged folders, empty classes), one sentence each.
    """

    class_names: tuple[str, ...] = ()
    label_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source, as JSON values. Equal descriptions mean the same records."""

    @abstractmethod
    def splits(self) -> dict[str, int | None]:
        """The splits by our names (`train`, `val`, `test`), each with its number of records where that is known."""

    @abstractmethod
    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        """A split's records from number `start` on, always in the same order. Nothing is left out: what cannot be
        used comes as a record that says so."""

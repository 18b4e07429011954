"""Sources of data sets: torchvision, the Hugging Face hub, folders, Parquet, WebDataset."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rayclip.data.registry import Row
from rayclip.data.sources.base import Record, Source
from rayclip.data.spec import Reading
from rayclip.paths import expand_home
from rayclip.types import UserError

Kind = Literal["torchvision", "hub", "folder", "parquet", "webdataset"]

__all__ = ["Kind", "Place", "Record", "Source", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Location of a data set's source.

    Attributes:
        kind: None for the row's default.
        location: folder or file; on the hub ORG/NAME. None downloads to `downloads_root()` (torchvision) or uses the
            row's repository (hub).
        revision: revision of the hub's repository; None for the newest.
        reading: columns, class names, and the label of the first class.
    """

    kind: Kind | None = None
    location: str | None = None
    revision: str | None = None
    reading: Reading = field(default_factory=Reading)


def downloads_root() -> Path:
    """Return the folder for torchvision's downloads: `RAYCLIP_DOWNLOADS`, or `~/.cache/rayclip/downloads`."""
    return Path(os.environ.get("RAYCLIP_DOWNLOADS", "~/.cache/rayclip/downloads")).expanduser()


def open_source(name: str, row: Row | None, place: Place, splits: Sequence[str] | None = None) -> Source:
    """Open the source of a data set.

    Args:
        name: name of the data set.
        row: its registry row, None for the user's own data.
        place: where to take it from.
        splits: the splits wanted, by our names, so that others need not be downloaded; None for all.

    Raises:
        UserError: the data set has no such source, or the source holds nothing usable.
    """
    kind = place.kind or (row.default if row is not None else None)
    if row is not None and row.default == "bundled":  # its name never means a prepared data set
        raise UserError(f"'{name}' comes with the program: there is nothing to prepare.")
    captions = row is not None and row.classes == 0
    reading = place.reading
    if kind in ("torchvision", "folder") and reading.decisive():
        raise UserError(f"--source {kind} has no columns and counts its labels itself: leave their options away.")
    if kind == "torchvision":
        if row is None or row.torchvision is None:
            raise UserError(f"torchvision has no data set '{name}': take --source {_others(row)}.")
        if reading.names is not None:
            raise UserError(f"torchvision names the classes of '{name}' itself: leave --class-names away.")
        from rayclip.data.sources.torchvision_sets import TorchvisionSource

        folder = Path(expand_home(place.location)) if place.location else downloads_root()
        return TorchvisionSource(row, folder, download=place.location is None, splits=splits)
    if kind == "hub":
        from rayclip.data.sources.hub import open_hub, parse_hub

        if place.location:
            hub = parse_hub(place.location, revision=place.revision)
        elif row is not None and row.hub is not None:
            hub = row.hub
        else:
            raise UserError(f"no place on the hub is known for '{name}': write --source hub ORG/NAME.")
        return open_hub(
            hub, revision=place.revision, splits=splits, class_names=() if captions else None, reading=reading
        )
    if kind is None:
        raise UserError(f"'{name}' is none of the known data sets: say where it is, with --source folder PATH.")
    if place.location is None:
        raise UserError(f"--source {kind} needs a path after it: --source {kind} PATH.")
    path = Path(expand_home(place.location))
    if kind == "parquet":
        from rayclip.data.sources.parquet_files import open_parquet

        return open_parquet(path, name, row.evaluated if row is not None else "test", () if captions else None, reading)
    if kind == "webdataset":
        from rayclip.data.sources.webdataset import open_webdataset

        return open_webdataset(path, () if captions else None, reading)
    from rayclip.data.sources.folder import open_folder

    return open_folder(row, path, reading.class_names(), str(reading.names))


def _others(row: Row | None) -> str:
    return "hub or folder" if row is not None and row.hub is not None else "folder"

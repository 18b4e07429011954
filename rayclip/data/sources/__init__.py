"""Sources of data sets: torchvision, the Hugging Face hub, folders, Parquet, WebDataset, other packages."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rayclip.data.registry import DatasetInfo
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
        kind: None for the data set's default.
        location: folder or file; on the hub ORG/NAME. None downloads to `downloads_root()` (torchvision) or uses the
            data set's repository (hub).
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


def open_source(name: str, info: DatasetInfo | None, place: Place, splits: Sequence[str] | None = None) -> Source:
    """Open the source of a data set; `info` is None for the user's own data. Without `splits`, by our names, all of
    them; others need not be downloaded.

    Raises:
        UserError: the data set has no such source, or the source holds nothing usable.
    """
    kind = place.kind or (info.taken_from if info is not None else None)
    if info is not None and info.open is not None:  # its name never means a prepared data set
        raise UserError(f"'{name}' comes with the program: there is nothing to prepare.")
    captions = info is not None and info.classes == 0
    reading, path = place.reading, Path(expand_home(place.location)) if place.location else None
    if kind in ("torchvision", "folder", "package") and reading.decisive():
        raise UserError(f"--source {kind} has no columns and counts its labels itself: leave their options away.")
    if kind in ("torchvision", "package") and reading.names is not None:
        raise UserError(f"{kind} names the classes of '{name}' itself: leave --class-names away.")
    if kind == "package" and info is not None and info.source is not None:
        return info.source(splits)
    if kind == "torchvision":
        if info is None or info.torchvision is None:
            others = "hub or folder" if info is not None and info.hub is not None else "folder"
            raise UserError(f"torchvision has no data set '{name}': take --source {others}.")
        from rayclip.data.sources.torchvision_sets import TorchvisionSource

        return TorchvisionSource(info, path or downloads_root(), download=path is None, splits=splits)
    if kind == "hub":
        from rayclip.data.sources.hub import open_hub, parse_hub

        known = info.hub if info is not None else None
        hub = parse_hub(place.location, revision=place.revision) if place.location else known
        if hub is None:
            raise UserError(f"no place on the hub is known for '{name}': write --source hub ORG/NAME.")
        return open_hub(hub, revision=place.revision, splits=splits, captions=captions, reading=reading)
    if kind is None:
        raise UserError(f"'{name}' is none of the known data sets: say where it is, with --source folder PATH.")
    if path is None:
        raise UserError(f"--source {kind} needs a path after it: --source {kind} PATH.")
    if kind == "parquet":
        from rayclip.data.sources.parquet_files import open_parquet

        return open_parquet(path, name, info.evaluated if info is not None else "test", captions, reading)
    if kind == "webdataset":
        from rayclip.data.sources.webdataset import open_webdataset

        return open_webdataset(path, captions, reading)
    from rayclip.data.sources.folder import open_folder

    return open_folder(info, path, reading.class_names(), str(reading.names))

"""Prepare and list data sets by name below a root."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rayclip.data.labels import Reading
from rayclip.data.manifest import Manifest, read_manifest
from rayclip.data.prepare import OnProgress, Request, prepare
from rayclip.data.registry import DATASETS, DatasetInfo, curated_names, find
from rayclip.data.sources.base import Source
from rayclip.data.sources.folder import open_folder
from rayclip.data.sources.hub import open_hub, parse_hub
from rayclip.data.sources.parquet_files import open_parquet
from rayclip.data.sources.torchvision_sets import TorchvisionSource
from rayclip.data.sources.webdataset import open_webdataset
from rayclip.data.spec import parse_spec
from rayclip.paths import expand_home
from rayclip.store import Store
from rayclip.types import UserError

Kind = Literal["torchvision", "hub", "folder", "parquet", "webdataset"]
EVALUATED = "evaluated"  # name for the split that the papers report on


def prepare_named(
    name: str,
    root: Store,
    on_progress: OnProgress = lambda *_: None,
    *,
    kind: Kind | None = None,
    location: str | None = None,
    revision: str | None = None,
    reading: Reading = Reading(),
    splits: Sequence[str] | None = None,
    **options: Any,
) -> Manifest:
    """Prepare one data set, from the registry or the user's own, below `root`.

    Args:
        kind: of source; None for the data set's default.
        location: folder or file; on the hub ORG/NAME. None downloads to `RAYCLIP_DOWNLOADS` (torchvision) or uses the
            data set's repository (hub).
        revision: of the hub's repository; None for the newest.
        reading: columns, class names, and the label of the first class.
        splits: by our names, or `evaluated`; None for all splits of the source.
        options: `strict`, `force`, `jobs`; see `prepare.Request`.

    Raises:
        UserError: no such data set, source or split; or see `prepare`.
    """
    name = parse_spec(name).place if name.endswith("#coop") else name
    row = DATASETS.get(name) if kind is not None else find(name)
    if row is None and not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"'{name}' cannot be a data set's name: use letters, digits, - and _.")
    wanted = None if splits is None else _splits(splits, row)
    source = _open_source(name, row, kind, location, revision, reading, wanted)
    there = source.splits()
    unknown = [s for s in wanted or () if s not in there]
    if unknown:
        raise UserError(f"there is no split '{unknown[0]}' of '{name}' in this source: it has {', '.join(there)}.")
    came_from = source.describe()["kind"]
    if row is None:
        class_names = tuple(" ".join(n.replace("_", " ").split()) for n in source.class_names)
    elif row.classes == 0 and source.class_names:
        raise UserError(f"'{name}' is image-caption data, but this source has classes: give one with captions.")
    elif row.classes and not source.class_names:
        raise UserError(f"'{name}' needs labelled images, but this source has captions: give one with classes.")
    else:
        class_names = curated_names(row, source.class_names, came_from, source.label_keys)
    # The row describes the published data set; the repository on the hub may hold other splits of it.
    cut = row.hub if row is not None and came_from == "hub" and location is None else None
    request = Request(
        name=name,
        class_names=class_names,
        splits=wanted or tuple(there),
        expected={**(row.splits if row is not None else {}), **(cut.counts if cut is not None else {})},
        notes=(cut.note,) if cut is not None and cut.note else (),
        counted=came_from in ("parquet", "hub", "webdataset") and not reading.labels_from,
        **options,
    )
    return prepare(request, source, root, on_progress)


def _splits(splits: Sequence[str], row: DatasetInfo | None) -> tuple[str, ...]:
    if not splits:
        raise UserError("--splits names no split: write train, val, test or evaluated.")
    if EVALUATED in splits and row is None:
        raise UserError("which split the papers evaluate is known of their own data sets only: name the split.")
    return tuple(dict.fromkeys(row.evaluated if s == EVALUATED and row is not None else s for s in splits))


def _open_source(
    name: str,
    info: DatasetInfo | None,
    kind: str | None,
    location: str | None,
    revision: str | None,
    reading: Reading,
    splits: Sequence[str] | None,
) -> Source:
    """Open the source of a data set; `info` is None for the user's own data. Only these splits need be downloaded."""
    kind = kind or (info.taken_from if info is not None else None)
    path = Path(expand_home(location)) if location else None
    captions = info is not None and info.classes == 0
    if info is not None and info.open is not None:  # its name never means a prepared data set
        raise UserError(f"'{name}' comes with the program: there is nothing to prepare.")
    if kind is None:
        raise UserError(f"'{name}' is none of the known data sets: say where it is, with --source folder PATH.")
    if path is None and kind in ("folder", "parquet", "webdataset"):
        raise UserError(f"--source {kind} needs a path after it: --source {kind} PATH.")
    if kind in ("torchvision", "folder", "package") and reading.decisive():
        raise UserError(f"--source {kind} has no columns and counts its labels itself: leave their options away.")
    if kind in ("torchvision", "package") and reading.names is not None:
        raise UserError(f"{kind} names the classes of '{name}' itself: leave --class-names away.")
    if kind == "package" and info is not None and info.source is not None:
        return info.source(splits)
    if kind == "hub":
        known = info.hub if info is not None else None
        hub = parse_hub(location, revision=revision) if location else known
        if hub is None:
            raise UserError(f"no place on the hub is known for '{name}': write --source hub ORG/NAME.")
        return open_hub(hub, revision=revision, splits=splits, captions=captions, reading=reading)
    if kind == "torchvision":
        if info is None:
            raise UserError(f"torchvision has no data set '{name}': take --source folder.")
        downloads = Path(os.environ.get("RAYCLIP_DOWNLOADS", "~/.cache/rayclip/downloads")).expanduser()
        return TorchvisionSource(info, path or downloads, download=path is None, splits=splits)
    assert path is not None
    if kind == "parquet":
        return open_parquet(path, name, info.evaluated if info is not None else "test", captions, reading)
    return open_webdataset(path, captions, reading) if kind == "webdataset" else open_folder(info, path, reading)


def prepared(root: Store) -> dict[str, Manifest | UserError]:
    """Return the manifests of the prepared data sets below `root`, by name; an error for a damaged manifest. Raises
    `UserError`: the root cannot be read."""
    found: dict[str, Manifest | UserError] = {}
    try:
        for name in root.folders():
            try:
                manifest = read_manifest(root.child(name))
            except UserError as error:
                found[name] = error
            else:
                found |= {name: manifest} if manifest is not None else {}
    except OSError as error:
        raise UserError(f"{root.root} cannot be read: {str(error).splitlines()[0]}.") from error
    return found

"""Prepare and list data sets by name below a root."""

from collections.abc import Mapping, Sequence
from typing import Any

from rayclip.data.classnames import curated_names
from rayclip.data.manifest import Manifest, read_manifest
from rayclip.data.prepare import OnProgress, Request, prepare
from rayclip.data.registry import DATASETS, DatasetInfo, find
from rayclip.data.sources import Place, open_source
from rayclip.store import Store
from rayclip.types import UserError

EVALUATED = "evaluated"  # name for the split that the papers report on


def prepare_named(
    name: str,
    place: Place,
    root: Store,
    on_progress: OnProgress = lambda *_: None,
    *,
    splits: Sequence[str] | None = None,
    **options: Any,
) -> Manifest:
    """Prepare one data set, from the registry or the user's own, below `root`.

    Args:
        splits: by our names, or `evaluated`; None for all splits of the source.
        options: `strict`, `force`, `jobs`; see `prepare.Request`.

    Raises:
        UserError: no such data set, source or split; or see `prepare`.
    """
    row = DATASETS.get(name) if place.kind is not None else find(name)
    if row is None and not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"'{name}' cannot be a data set's name: use letters, digits, - and _.")
    wanted = None if splits is None else _splits(splits, row)
    source = open_source(name, row, place, wanted)
    there = source.splits()
    unknown = [s for s in wanted or () if s not in there]
    if unknown:
        raise UserError(f"there is no split '{unknown[0]}' of '{name}' in this source: it has {', '.join(there)}.")
    kind = source.describe()["kind"]
    if row is None:
        class_names = tuple(" ".join(n.replace("_", " ").split()) for n in source.class_names)
    elif row.classes == 0 and source.class_names:
        raise UserError(f"'{name}' is image-caption data, but this source has classes: give one with captions.")
    elif row.classes and not source.class_names:
        raise UserError(f"'{name}' needs labelled images, but this source has captions: give one with classes.")
    else:
        class_names = curated_names(row, source.class_names, kind, source.label_keys)
    # The row describes the published data set; the repository on the hub may hold other splits of it.
    cut = row.hub if row is not None and kind == "hub" and place.location is None else None
    expected: Mapping[str, int] = {**(row.splits if row is not None else {}), **(cut.counts if cut is not None else {})}
    request = Request(
        name=name,
        class_names=class_names,
        splits=wanted or tuple(there),
        expected=expected,
        notes=(cut.note,) if cut is not None and cut.note else (),
        counted=kind in ("parquet", "hub", "webdataset") and not place.reading.labels_from,
        **options,
    )
    return prepare(request, source, root, on_progress)


def _splits(splits: Sequence[str], row: DatasetInfo | None) -> tuple[str, ...]:
    if not splits:
        raise UserError("--splits names no split: write train, val, test or evaluated.")
    if EVALUATED in splits and row is None:
        raise UserError("which split the papers evaluate is known of their own data sets only: name the split.")
    return tuple(dict.fromkeys(row.evaluated if s == EVALUATED and row is not None else s for s in splits))


def prepared(root: Store) -> dict[str, Manifest | UserError]:
    """Return the manifests of the prepared data sets below `root`, by name; an error for a damaged manifest.

    Raises:
        UserError: the root cannot be read.
    """
    found: dict[str, Manifest | UserError] = {}
    try:
        for name in root.folders():
            store = root.child(name)
            try:
                manifest = read_manifest(store)
            except UserError as error:
                found[name] = error
            else:
                found |= {name: manifest} if manifest is not None else {}
    except OSError as error:
        raise UserError(f"{root.root} cannot be read: {str(error).splitlines()[0]}.") from error
    return found

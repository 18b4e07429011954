"""`rayclip data`: list, prepare, show and verify the papers' data sets, all in one layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.cli.command import Positive, add_command, command_group, complete
from rayclip.cli.options import print_table, split
from rayclip.names import DATASETS
from rayclip.paths import check_file, check_folder, expand_home, split_places
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.data import ImageSet
    from rayclip.data.manifest import Manifest
    from rayclip.data.registry import DatasetInfo
    from rayclip.store import Store

app = command_group("List, prepare, look at and verify data sets.")

_PROBLEMS_SHOWN = 20
_RESIZED = {
    "square": "to the model's input, square (224: Resize(224))",
    "crop": "shorter side to 8/7 of the model's input, then its centre (224: Resize(256), CenterCrop(224))",
}
_complete = complete(DATASETS, "datasets")


def _open_root(root: str | None) -> "Store":
    from rayclip.data.opening import data_root
    from rayclip.store import Store

    return Store(root or data_root())


def list_(root: str | None = None, json: bool = False) -> None:
    """List the known data sets, and which of them are prepared.

    Args:
        json: As JSON.
    """
    from rayclip.data.catalog import prepared
    from rayclip.data.registry import DATASETS

    store = _open_root(root)
    found = prepared(store)
    if json:
        import json as j

        known = [{**row.to_dict(), "prepared": _splits(found.get(name))} for name, row in DATASETS.items()]
        own = [{"name": name, "prepared": _splits(m)} for name, m in found.items() if name not in DATASETS]
        print(j.dumps({"root": store.root, "data_sets": known + own}, indent=1))
        return
    rows: list[tuple[str | int, ...]] = []
    for name, row in DATASETS.items():
        evaluated = f"{row.evaluated} {row.splits[row.evaluated]:,}"
        state = "bundled" if row.open is not None else _short(found.get(name))
        rows.append((name, row.classes or "captions", evaluated, row.taken_from, state))
    rows += [(name, "", "", "own", _short(manifest)) for name, manifest in found.items() if name not in DATASETS]
    print_table(rows, ("name", "classes", "evaluated", "source", "prepared"))
    print(f"\nprepared below {store.root}; `rayclip data prepare NAME` adds one, `rayclip data show NAME` tells more.")


def show(
    name: Annotated[str, typer.Argument(autocompletion=_complete)],
    root: str | None = None,
    split: str | None = None,
    sheet: Annotated[Path | None, typer.Option(metavar="PNG")] = None,
) -> None:
    """Print a data set's protocol, classes and counts; write a contact sheet on request.

    Args:
        name: A data set of `rayclip data list`, or a .parquet file.
        split: Of the contact sheet. [default: the split that the papers evaluate]
        sheet: Write a contact sheet.
    """
    name = expand_home(name)
    sheet = sheet if sheet is None else sheet.expanduser()
    if sheet is not None:
        check_file("--sheet", sheet)

    from rayclip.data.catalog import prepared
    from rayclip.data.registry import DATASETS, find
    from rayclip.data.spec import parse_spec

    store = _open_root(root)
    own_file = parse_spec(name).place.endswith(".parquet")
    manifest = None if own_file else prepared(store).get(name)
    row = None if own_file else DATASETS.get(name)
    if row is None and manifest is None and not own_file:
        row = find(name)
    if row is not None:
        _show_row(row)
    if isinstance(manifest, UserError):
        raise manifest
    if manifest is not None:
        _show_manifest(manifest, store.child(name).root)
    elif row is not None and row.open is None:
        print(f"not prepared below {store.root}: rayclip data prepare {name}")
    bundled = row is not None and row.open is not None
    if own_file or bundled:
        _show_classes(name, list(row.splits) if row is not None else ["test"])
    if sheet is not None:
        from rayclip.data.sheet import contact_sheet

        sheet.write_bytes(contact_sheet(name if own_file or bundled else store.child(name).root, split))
        print(f"contact sheet: {sheet}")


def prepare(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", autocompletion=_complete)],
    root: str | None = None,
    source: Literal["torchvision", "hub", "folder", "parquet", "webdataset"] | None = None,
    revision: str | None = None,
    splits: Sequence[str] = (),
    class_names: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    labels_from: Annotated[int, typer.Option(min=0, max=1)] = 0,
    image_column: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    strict: bool = False,
    force: bool = False,
    jobs: Positive | None = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Write data sets as Parquet with a manifest, from torchvision, the Hugging Face hub, folders or Parquet files.

    After an interruption the same command continues; when all is prepared, it does nothing. Unusable images are set
    aside in rejected.parquet with the reason.

    Args:
        names: Data sets; a path or ORG/NAME among them is where --source takes them from.
        source: torchvision [PATH], hub [ORG/NAME], folder PATH, parquet PATH or webdataset PATH.
            [default: each data set's own, see `rayclip data list`]
        revision: Branch, tag or commit on the hub. [default: newest]
        splits: train, val, test or evaluated, commas between. [default: all there are]
        class_names: Class names, for data that carry none: one name per line in label order, or a JSON list.
        labels_from: The label of the first class.
        image_column, label_column: Of Parquet. [default: found out]
        strict: An image that cannot be used is an error.
        force: Replace what is prepared already.
        jobs: Threads that check images. [default: one per core]
    """
    from rayclip.data.catalog import prepare_named
    from rayclip.data.labels import Reading
    from rayclip.data.manifest import MANIFEST
    from rayclip.data.registry import find
    from rayclip.progress import Display

    wanted, location = _split_arguments(names)
    if source is None:
        if location is not None:
            raise UserError(f"--source says what {location} is: folder, parquet, webdataset, torchvision or hub.")
        for name in wanted:
            find(name)
    if location is not None and len(wanted) > 1 and source != "torchvision":
        raise UserError(f"--source {source} {location} is one data set, but {len(wanted)} are named.")
    store, option = _open_root(root), "--root" if root else "the data root (RAYCLIP_DATA)"
    for name in wanted:
        check_folder(option, store.child(name).root, done="" if force else MANIFEST)
    reading = Reading(
        image=image_column,
        label=label_column,
        labels_from=1 if labels_from else 0,
        names=None if class_names is None else str(Path(expand_home(class_names)).absolute()),
    )
    if reading != Reading() and len(wanted) > 1:
        raise UserError("--class-names, --labels-from and the columns are of one data set, but several are named.")
    reading.class_names()
    options: dict[str, Any] = {
        "strict": strict,
        "force": force,
        "jobs": jobs,
        "splits": split(splits) if splits else None,
    }
    options |= {"kind": source, "location": location, "revision": revision, "reading": reading}
    for name in wanted:
        worked = False
        with Display(quiet=quiet) as display:

            def tell(split: str, done: int, total: int, remark: str, name: str = name) -> None:
                nonlocal worked
                worked = True
                display.update(f"{name} {split}", done, total, remark)

            manifest = prepare_named(name, store, tell, **options)
        where = store.child(name).root
        print(f"{name}: {'prepared in' if worked else 'is already prepared in'} {where}")
        _print_splits(manifest)
        _print_notes(manifest)


def verify(
    root: str | None = None,
    names: Annotated[list[str] | None, typer.Argument(autocompletion=_complete)] = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Verify files by hash and images by count; of your own .parquet files, decode every image.

    Args:
        names: Data sets, or .parquet files. [default: all that is prepared]
    """
    from rayclip.data.catalog import prepared
    from rayclip.data.spec import parse_spec
    from rayclip.data.verify import verify as verify_one
    from rayclip.progress import Display

    store = _open_root(root)
    chosen = split_places(names or []) or list(prepared(store))
    if not chosen:
        raise UserError(f"nothing is prepared below {store.root}: name a data set's root with --root.")
    problems = 0
    for name in chosen:
        with Display(quiet=quiet) as display:

            def tell(done: int, total: int, name: str = name) -> None:
                display.update(f"verify {Path(name).name}", done, total)

            if parse_spec(name).place.endswith(".parquet"):
                _verify_file(name, tell)
                continue
            manifest, found = verify_one(store.child(name), lambda d, t: tell(d >> 20, t >> 20))
        print(f"{name}: {'as its manifest says' if not found else f'{len(found)} problems'}")
        _print_splits(manifest)
        for problem in found[:_PROBLEMS_SHOWN]:
            print(f"  problem: {problem}")
        if len(found) > _PROBLEMS_SHOWN:
            print(f"  and {len(found) - _PROBLEMS_SHOWN} more")
        problems += len(found)
    if problems:
        raise UserError(f"{problems} problems: `rayclip data prepare NAME --force` makes a data set anew.")


def _split_arguments(names: list[str]) -> tuple[list[str], str | None]:
    """Split the arguments into names and the only path or hub id, if there is one."""
    from rayclip.data.registry import DATASETS

    names = split_places(names)
    places = [n for n in names if "/" in n or n.endswith(".parquet") or (n not in DATASETS and Path(n).exists())]
    wanted = list(dict.fromkeys(n for n in names if n not in places))
    if len(places) > 1:
        raise UserError(f"give one place after --source, not {len(places)} ({', '.join(places)}).")
    if not wanted:
        raise UserError(f"name the data set that {places[0]} is: rayclip data prepare NAME --source … {places[0]}.")
    return wanted, places[0] if places else None


def _verify_file(name: str, tell: Any) -> None:
    from rayclip.data.opening import open_either
    from rayclip.data.parquet import PairSet, ParquetImages

    data = open_either(name)
    if isinstance(data, PairSet):
        data.check(tell, again=True)
        print(f"{name}: every image can be read: {len(data):,} with {sum(map(len, data.captions)):,} captions")
        return
    assert isinstance(data, ParquetImages)
    for note in data.notes:
        print(f"{name}: note: {note}")
    data.check(tell, again=True)
    counts = _per_class(data)
    spread = f"{min(counts):,} to {max(counts):,} per class"
    print(f"{name}: every image can be read: {len(data):,} of {len(counts)} classes, {spread}")


def _show_row(row: "DatasetInfo") -> None:
    sources = [
        f"torchvision {row.torchvision.cls}" if row.torchvision else "",
        f"hub {row.hub.repo} ({row.hub.form})" if row.hub else "",
        row.taken_from if row.taken_from in ("bundled", "package") else "",
        f"folder ({row.folder})" if row.open is None else "",
    ]
    facts = {
        "name": f"{row.name} ({row.title})",
        "classes": str(row.classes or "none: images with captions"),
        "splits": ", ".join(f"{part} {count:,}" for part, count in row.splits.items()),
        "evaluated": f"{row.evaluated}, {row.splits[row.evaluated]:,} images",
        "resize": _RESIZED[row.resize],
        "sources": "; ".join(filter(None, sources)),
        "licence": row.licence,
        "citation": row.citation,
        "note": row.note,
        "on the hub": row.hub.note if row.hub else "",
    }
    print_table([(name, fact) for name, fact in facts.items() if fact])


def _show_manifest(manifest: "Manifest", where: str) -> None:
    source = ", ".join(f"{k} {v}" for k, v in manifest.source.items() if isinstance(v, str))
    print_table([("prepared in", where), ("from", source)])
    _print_splits(manifest)
    _print_notes(manifest)
    if manifest.class_names:
        _print_classes(manifest.class_names, {name: s.per_class for name, s in manifest.splits.items()})


def _show_classes(name: str, splits: list[str]) -> None:
    from rayclip.data import open_data

    opened = {part: open_data(name, part) for part in splits}
    _print_classes(opened[splits[-1]].class_names, {part: _per_class(data) for part, data in opened.items()})


def _per_class(data: "ImageSet") -> tuple[int, ...]:
    import numpy as np

    return tuple(np.bincount(data.labels, minlength=len(data.class_names)).tolist())


def _print_classes(names: tuple[str, ...], counts: dict[str, tuple[int, ...]]) -> None:
    from rich.columns import Columns

    from rayclip.terminal import console

    print(f"classes, with their images ({' / '.join(counts)}):")
    cells = [f"{name} {'/'.join(str(c[label]) for c in counts.values())}" for label, name in enumerate(names)]
    console().print(Columns(cells, padding=(0, 2)))


def _print_splits(manifest: "Manifest") -> None:
    for name, part in manifest.splits.items():
        said = [f"{part.rows:,} images"]
        if part.converted:
            said.append("converted: " + ", ".join(f"{n:,} {what}" for what, n in part.converted.items()))
        if part.rejected:
            said.append(f"set aside: {part.rejected:,} (rejected.parquet)")
        size = sum(shard.bytes for shard in part.shards)
        said.append(f"{len(part.shards)} shard{'s' if len(part.shards) > 1 else ''}, {size / 1e6:,.1f} MB")
        print(f"  {name}: {'; '.join(said)}")


def _print_notes(manifest: "Manifest") -> None:
    for note in manifest.notes:
        print(f"  note: {note}")


def _splits(manifest: "Manifest | UserError | None") -> dict[str, int]:
    if manifest is None or isinstance(manifest, UserError):
        return {}
    return {name: part.rows for name, part in manifest.splits.items()}


def _short(manifest: "Manifest | UserError | None") -> str:
    if isinstance(manifest, UserError):
        return "damaged manifest"
    return ", ".join(f"{name} {rows:,}" for name, rows in _splits(manifest).items()) or "–"


add_command(app, "list", list_)
for command in (prepare, show, verify):
    add_command(app, command.__name__, command)

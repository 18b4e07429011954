"""`rayclip data`: list, prepare, show and verify the papers' data sets, all in one layout."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.cli.help import Command, Group
from rayclip.cli.options import JsonLogs, Quiet, complete_data
from rayclip.paths import check_file, check_folder, expand_home, split_places
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.data.manifest import Manifest
    from rayclip.data.registry import DatasetInfo

app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, help="List, prepare, look at and verify data sets."
)

Root = Annotated[
    str | None,
    typer.Option(
        help="Folder or object-store URI of the prepared data sets.  [default: RAYCLIP_DATA, or ~/.cache/rayclip/data]"
    ),
]
_PROBLEMS_SHOWN = 20


@app.command("list", cls=Command)
def list_(
    root: Root = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the known data sets, and which of them are prepared."""
    from rayclip.data.catalog import prepared
    from rayclip.data.opening import data_root
    from rayclip.data.registry import DATASETS
    from rayclip.store import Store

    store = Store(root or data_root())
    found = prepared(store)
    if json:
        import json as j

        known = [{**row.to_dict(), "prepared": _splits(found.get(name))} for name, row in DATASETS.items()]
        own = [{"name": name, "prepared": _splits(m)} for name, m in found.items() if name not in DATASETS]
        print(j.dumps({"root": store.root, "data_sets": known + own}, indent=1))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("name", "left"), ("classes", "right"), ("evaluated", "left"), ("source", "left")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("prepared", overflow="fold")
    for name, row in DATASETS.items():
        evaluated = f"{row.evaluated} {row.splits[row.evaluated]:,}"
        kind = str(row.classes) if row.classes else "captions"
        state = "bundled" if row.open is not None else _short(found.get(name))
        table.add_row(name, kind, evaluated, row.taken_from, state)
    for name, manifest in found.items():
        if name not in DATASETS:
            table.add_row(name, "", "", "own", _short(manifest))
    _console().print(table)
    print(f"\nprepared below {store.root}; `rayclip data prepare NAME` adds one, `rayclip data show NAME` tells more.")


@app.command(cls=Command)
def show(
    name: Annotated[
        str, typer.Argument(help="A data set of `rayclip data list`, or a .parquet file.", autocompletion=complete_data)
    ],
    root: Root = None,
    split: Annotated[
        str | None, typer.Option(help="Of the contact sheet.  [default: the split that the papers evaluate]")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="PNG", help="Write a contact sheet.")] = None,
) -> None:
    """Print a data set's protocol, classes and counts; write a contact sheet on request."""
    name = expand_home(name)
    sheet = sheet if sheet is None else sheet.expanduser()
    if sheet is not None:
        check_file("--sheet", sheet)

    from rayclip.data.catalog import prepared
    from rayclip.data.opening import data_root
    from rayclip.data.registry import DATASETS, find
    from rayclip.data.spec import parse_spec
    from rayclip.store import Store

    store = Store(root or data_root())
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

        place = name if own_file or bundled else store.child(name).root
        sheet.write_bytes(contact_sheet(place, split))
        print(f"contact sheet: {sheet}")


@app.command(cls=Command)
def prepare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Data sets; a path or ORG/NAME among them is where --source takes them from.",
            autocompletion=complete_data,
        ),
    ],
    root: Root = None,
    source: Annotated[
        Literal["torchvision", "hub", "folder", "parquet", "webdataset"] | None,
        typer.Option(
            help="torchvision [PATH], hub [ORG/NAME], folder PATH, parquet PATH or webdataset PATH.  "
            "[default: each data set's own, see `rayclip data list`]"
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.  [default: newest]")] = None,
    splits: Annotated[
        list[str] | None, typer.Option(help="train, val, test or evaluated, commas between.  [default: all there are]")
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Class names, for data that carry none: one name per line in label order, or a JSON list.",
        ),
    ] = None,
    labels_from: Annotated[int, typer.Option(min=0, max=1, help="The label of the first class.")] = 0,
    image_column: Annotated[str | None, typer.Option(metavar="NAME", help="Of Parquet.  [default: found out]")] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME", help="Of Parquet.  [default: found out]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="An image that cannot be used is an error.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is prepared already.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads that check images.  [default: one per core]")] = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
) -> None:
    """Write data sets as Parquet with a manifest, from torchvision, the Hugging Face hub, folders or Parquet files.

    After an interruption the same command continues; when all is prepared, it does nothing. Unusable images are set
    aside in rejected.parquet with the reason.
    """
    from rayclip.data.catalog import prepare_named
    from rayclip.data.manifest import MANIFEST
    from rayclip.data.opening import data_root
    from rayclip.data.registry import find
    from rayclip.data.spec import Reading
    from rayclip.progress import Display
    from rayclip.store import Store

    wanted, location = _split_arguments(names)
    if source is None:
        if location is not None:
            raise UserError(f"--source says what {location} is: folder, parquet, webdataset, torchvision or hub.")
        for name in wanted:
            find(name)
    if location is not None and len(wanted) > 1 and source != "torchvision":
        raise UserError(f"--source {source} {location} is one data set, but {len(wanted)} are named.")
    base, option = root or data_root(), "--root" if root else "the data root (RAYCLIP_DATA)"
    for name in wanted:
        check_folder(option, f"{base}/{name}", done="" if force else MANIFEST)
    store = Store(base)
    wanted_splits = None if splits is None else [s.strip() for s in ",".join(splits).split(",") if s.strip()]
    reading = Reading(
        image=image_column,
        label=label_column,
        labels_from=1 if labels_from else 0,
        names=None if class_names is None else str(Path(expand_home(class_names)).absolute()),
    )
    if reading != Reading() and len(wanted) > 1:
        raise UserError("--class-names, --labels-from and the columns are of one data set, but several are named.")
    reading.class_names()
    options: dict[str, Any] = {"strict": strict, "force": force, "jobs": jobs, "splits": wanted_splits}
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
        for note in manifest.notes:
            print(f"  note: {note}")


@app.command(cls=Command)
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data sets, or .parquet files.  [default: all that is prepared]", autocompletion=complete_data
        ),
    ] = None,
    root: Root = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
) -> None:
    """Verify files by hash and images by count; of your own .parquet files, decode every image."""
    from rayclip.data.catalog import prepared
    from rayclip.data.opening import data_root
    from rayclip.data.spec import parse_spec
    from rayclip.data.verify import verify as verify_one
    from rayclip.progress import Display
    from rayclip.store import Store

    store = Store(root or data_root())
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
    import numpy as np

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
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    print(
        f"{name}: every image can be read: {len(data):,} of {len(counts)} classes, {counts.min():,} to "
        f"{counts.max():,} a class"
    )


def _show_row(row: "DatasetInfo") -> None:
    rule = {
        "square": "to the model's input, square (224: Resize(224))",
        "crop": "shorter side to 8/7 of the model's input, then its centre (224: Resize(256), CenterCrop(224))",
    }[row.resize]
    sources = [f"torchvision {row.torchvision.cls}"] if row.torchvision is not None else []
    sources += [f"hub {row.hub.repo} ({row.hub.form})"] if row.hub is not None else []
    sources += [row.taken_from] if row.taken_from in ("bundled", "package") else []
    sources += [f"folder ({row.folder})"] if row.open is None else []
    lines = {
        "name": f"{row.name} ({row.title})",
        "classes": str(row.classes) if row.classes else "none: images with captions",
        "splits": ", ".join(f"{split} {count:,}" for split, count in row.splits.items()),
        "evaluated": f"{row.evaluated}, {row.splits[row.evaluated]:,} images",
        "resize": rule,
        "sources": "; ".join(sources),
        "licence": row.licence,
        "citation": row.citation,
    }
    if row.note:
        lines["note"] = row.note
    if row.hub is not None and row.hub.note:
        lines["on the hub"] = row.hub.note
    _print_facts(lines)


def _show_manifest(manifest: "Manifest", where: str) -> None:
    source = ", ".join(f"{k} {v}" for k, v in manifest.source.items() if isinstance(v, str))
    _print_facts({"prepared in": where, "from": source})
    _print_splits(manifest)
    for note in manifest.notes:
        print(f"  note: {note}")
    if manifest.class_names:
        _print_classes(manifest.class_names, {name: s.per_class for name, s in manifest.splits.items()})


def _show_classes(name: str, splits: list[str]) -> None:
    import numpy as np

    from rayclip.data import open_data

    opened = {split: open_data(name, split) for split in splits}
    names = opened[splits[-1]].class_names
    _print_classes(names, {r: tuple(np.bincount(d.labels, minlength=len(names)).tolist()) for r, d in opened.items()})


def _print_classes(names: tuple[str, ...], counts: dict[str, tuple[int, ...]]) -> None:
    from rich.columns import Columns

    print(f"classes, with their images ({' / '.join(counts)}):")
    cells = [f"{name} {'/'.join(str(c[label]) for c in counts.values())}" for label, name in enumerate(names)]
    _console().print(Columns(cells, padding=(0, 2)))


def _print_splits(manifest: "Manifest") -> None:
    for name, split in manifest.splits.items():
        parts = [f"{split.rows:,} images"]
        if split.converted:
            parts.append("converted: " + ", ".join(f"{n:,} {what}" for what, n in split.converted.items()))
        if split.rejected:
            parts.append(f"set aside: {split.rejected:,} (rejected.parquet)")
        size = sum(s.bytes for s in split.shards)
        parts.append(f"{len(split.shards)} shard{'s' if len(split.shards) > 1 else ''}, {size / 1e6:,.1f} MB")
        print(f"  {name}: {'; '.join(parts)}")


def _print_facts(lines: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for key, value in lines.items():
        table.add_row(key, value)
    _console().print(table)


def _splits(manifest: "Manifest | UserError | None") -> dict[str, int]:
    if manifest is None or isinstance(manifest, UserError):
        return {}
    return {name: split.rows for name, split in manifest.splits.items()}


def _short(manifest: "Manifest | UserError | None") -> str:
    if isinstance(manifest, UserError):
        return "damaged manifest"
    return ", ".join(f"{name} {rows:,}" for name, rows in _splits(manifest).items()) or "–"


def _console() -> Any:
    from rayclip import terminal

    return terminal.console()

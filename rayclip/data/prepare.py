"""Write a source's images as Parquet shards with a manifest.

Each shard is written aside, hashed and moved into its place; then `unfinished.json` records how far the source has been
read, so that an interrupted run can resume there. The manifest is written last.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from rayclip import __version__
from rayclip.data.intake import BadImageError, CheckedImage, check_image, in_order
from rayclip.data.labels import notes_on_classes
from rayclip.data.leases import Leases
from rayclip.data.manifest import MANIFEST, RECIPE, SUM, File, Manifest, ShardFile, Split, checksum, read_manifest
from rayclip.data.shardwriter import Layout, ShardWriter, WrittenShard, npy_bytes, part_name
from rayclip.data.sources.base import Record, Source
from rayclip.store import Store
from rayclip.types import UserError

JOURNAL = "unfinished.json"
REJECTED = "rejected.parquet"
_SHOWN = 100  # characters of a path or a reason that an error shows
_WRITTEN = re.compile(r".+-\d{5,}(\.parquet|\.part\.npy)|index-.+\.npy")  # shards and their indexes
_REJECTED_SCHEMA = pa.schema(
    [("split", pa.string()), ("path", pa.string()), ("row", pa.int64()), ("label", pa.int64()), ("reason", pa.string())]
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request to prepare a data set.

    Attributes:
        class_names: curated spelling in label order; empty for captions.
        splits: the source's splits to prepare.
        expected: published sizes of the splits, if known; a different size is noted.
        counted: whether labels are the source's own numbers, which might be counted from 1.
        strict: whether any rejection is an error.
        force: whether to replace existing data.
        jobs: threads that read and check images; None for one per core.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Sequence[str]
    expected: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    counted: bool = False
    strict: bool = False
    force: bool = False
    jobs: int | None = None
    layout: Layout = field(default_factory=Layout)


OnProgress = Callable[[str, int, int, str], None]  # split, records done, records in all (0: unknown), remark


def prepare(request: Request, source: Source, root: Store, on_progress: OnProgress = lambda *_: None) -> Manifest:
    """Prepare a data set below `root`.

    Finished parts of an interrupted run are kept, and so are splits already prepared from the same source; repeating a
    finished run does nothing. Raises `UserError`: no usable image, a full disk or another file error, a rejection under
    `strict`, files of another origin in the folder, or another run working in it."""
    store = root.child(request.name)
    with _locked(store):
        try:
            before = _ready_folder(request, source, store)
            missing = [s for s in request.splits if before is None or s not in before.splits]
            if before is not None and not missing:
                return before
            # Equal if the shards of an earlier run can be kept.
            layout = dataclasses.asdict(request.layout)
            decisive = [RECIPE, request.class_names, layout, source.describe(), source.class_names]
            identity = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
            journal = _Journal.open(store, identity)
            for split in missing:
                _prepare_split(request, source, split, store, journal, on_progress)
            return _finish(request, source, store, journal, before)
        except OSError as error:
            raise UserError(
                f"preparing '{request.name}' stopped ({str(error).splitlines()[0]}): mend that and run again; what is "
                "finished is kept."
            ) from error


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Lock a data set against other runs, and delete partial files of a killed run; at an object store, wait for
    others."""
    if not store.is_local:
        with Leases(store) as leases, leases.hold("data", "preparing data"):
            yield
        return
    path = store.path("") / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is preparing {store.root} at this moment: wait for it to end.") from None
    except OSError as error:
        raise UserError(f"cannot write below {path.parent}: {error.strerror or error}.") from error
    with lock:
        for left in path.parent.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        store.delete_unfinished("")
        yield


def _ready_folder(request: Request, source: Source, store: Store) -> Manifest | None:
    """Return the manifest of prepared data to keep, None if there is none; with `force`, clear the folder."""
    if request.force:  # the manifest first, so that a manifest never describes incomplete data
        indexes = filter(_WRITTEN.fullmatch, store.names("", ".npy"))
        for name in [MANIFEST, JOURNAL, *store.names("", ".parquet"), *indexes]:
            store.delete(name)
        return None
    before = read_manifest(store)
    if before is None:
        if store.size(JOURNAL) is None and store.names("", ".parquet"):
            raise UserError(
                f"{store.root} holds Parquet files that were not prepared here: choose another --root, or "
                "replace them with --force."
            )
        return None
    # A description may have `splits`, but only of those that are open: only splits in both are compared.
    now = source.describe()
    old, new = before.source.get("splits", {}), now.get("splits", {})
    shared = old.keys() & new.keys() & before.splits.keys()
    same = {**before.source, "splits": 0} == {**now, "splits": 0} and all(old[s] == new[s] for s in shared)
    if before.class_names != request.class_names or not same:
        short = ", ".join(str(v) for v in before.source.values() if isinstance(v, str)) or "unknown"
        raise UserError(
            f"'{request.name}' is already prepared in {store.root} from another source ({short}): keep it, or replace "
            "it with --force."
        )
    return before


class _Progress(BaseModel):
    """Progress of one split: how many of the source's records it has taken, and all that the manifest will say."""

    consumed: int = 0
    done: bool = False
    converted: dict[str, int] = {}
    size: tuple[int, int] | None = None
    sizes_differ: bool = False
    shards: list[WrittenShard] = []
    rejected: list[dict[str, Any]] = []

    def count(self, taken: CheckedImage) -> None:
        if taken.converted is not None:
            self.converted[taken.converted] = self.converted.get(taken.converted, 0) + 1
        self.size = self.size or taken.size
        self.sizes_differ |= taken.size != self.size

    def report(self, on_progress: OnProgress, split: str, total: int) -> None:
        on_progress(split, self.consumed, total, f"{len(self.rejected)} set aside" if self.rejected else "")


class _Journal(BaseModel):
    """`unfinished.json`, written right after a shard is in its place, so that all counts refer to the same record."""

    identity: str
    splits: dict[str, _Progress] = {}

    @classmethod
    def open(cls, store: Store, identity: str) -> "_Journal":
        """Return the journal in the store; an empty one, and the other run's shards deleted, if that is of another
        source or recipe."""
        text = store.read(JOURNAL)
        if text is not None:
            # Treat a journal that cannot be read, or that names files elsewhere, as missing.
            with contextlib.suppress(ValidationError, UserError):
                journal = cls.model_validate_json(text)
                shards = [shard for split in journal.splits.values() for shard in split.shards]
                there = (store.size(s.file) == s.bytes and _has_part(store, s) for s in shards)
                raw = json.loads(text)
                if journal.identity == identity and raw.get(SUM) == checksum(raw) and all(there):
                    return journal
            before = read_manifest(store)
            kept = {f.file for s in before.splits.values() for f in s.files} if before is not None else set()
            for name in [*store.names("", ".parquet"), *store.names("", ".npy")]:
                if name not in kept and _WRITTEN.fullmatch(name):
                    store.delete(name)
        journal = cls(identity=identity)
        journal.write(store)  # before the first shard, so that a run killed right after it can still resume
        return journal

    def write(self, store: Store) -> None:
        raw = self.model_dump(mode="json")
        store.write(JOURNAL, json.dumps({**raw, SUM: checksum(raw)}).encode())


def _has_part(store: Store, shard: WrittenShard) -> bool:
    part = store.read(part_name(shard.file))
    return part is not None and shard.part in ("", hashlib.sha256(part).hexdigest())


def _prepare_split(
    request: Request, source: Source, split: str, store: Store, journal: _Journal, on_progress: OnProgress
) -> None:
    progress = journal.splits.setdefault(split, _Progress())
    if progress.done:
        return
    total = source.splits()[split] or 0
    classes = len(request.class_names)
    writer: ShardWriter | None = None
    outcomes = in_order(source.records(split, progress.consumed), lambda r: _examine(r, classes), request.jobs)
    with ExitStack() as stack:
        stack.enter_context(closing(outcomes))
        for record, outcome in outcomes:
            row = progress.consumed
            progress.consumed += 1
            if isinstance(outcome, str):
                if request.strict:
                    raise UserError(
                        f"{record.path} of '{request.name}' {split} cannot be used: {outcome}; without --strict it "
                        "would be set aside."
                    )
                progress.rejected.append(
                    {"split": split, "path": record.path, "row": row, "label": record.label, "reason": outcome}
                )
            else:
                if writer is None:
                    file = f"{split}-{len(progress.shards):05d}.parquet"
                    writer = ShardWriter(store, file, request.layout, request.class_names, source.class_names)
                    stack.enter_context(closing(writer))
                writer.add(record, outcome.data)
                progress.count(outcome)
                if writer.bytes >= request.layout.shard:
                    progress.shards.append(writer.commit())
                    writer = None
                    journal.write(store)
            progress.report(on_progress, split, total)
        if writer is not None:
            progress.shards.append(writer.commit())
    if not progress.shards:
        shown = [str(progress.rejected[0][key])[:_SHOWN] for key in ("path", "reason")] if progress.rejected else []
        first = "".join(f": {text}" for text in shown)
        raise UserError(
            f"none of the {progress.consumed} {split} images of '{request.name}' can be used{first or ' (none found)'}."
        )
    progress.done = True
    journal.write(store)
    progress.report(on_progress, split, progress.consumed)


def _examine(record: Record, classes: int) -> CheckedImage | str:
    """Return the image, or the reason why the record cannot be used. Runs on a worker thread."""
    if record.problem is not None:
        return record.problem
    if classes and record.label is None:
        return "no label"
    if classes and not 0 <= record.label < classes:  # type: ignore[operator]
        # An error, not a rejection: if this label does not fit, others may be shifted.
        raise UserError(f"{record.path} has the label {record.label}, which is not among the {classes} classes.")
    if not classes and not any(c.strip() for c in record.captions):
        return "no caption"
    try:
        return check_image(record.read())
    except BadImageError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _finish(request: Request, source: Source, store: Store, journal: _Journal, before: Manifest | None) -> Manifest:
    splits = dict(before.splits) if before is not None else {}
    notes = [*request.notes, *source.notes, *(before.notes if before is not None else ())]
    table = store.read_tables([REJECTED] if store.size(REJECTED) is not None else [])
    rejected = [] if table is None else [r for r in table.to_pylist() if r["split"] in splits]
    done = {split: progress for split, progress in journal.splits.items() if progress.done}
    remedy = "prepare it again with --labels-from 1 --force" if request.counted else ""
    for split, progress in done.items():
        splits[split] = _describe(request, split, progress, store)
        came, published = progress.consumed, request.expected.get(split)
        if published is not None and published != came:
            notes.append(f"The {split} split has {came:,} images; {published:,} are published.")
        per_class = splits[split].per_class
        notes += notes_on_classes(request.class_names, per_class, source.class_names, split, remedy)
        rejected = [r for r in rejected if r["split"] != split] + progress.rejected
    if rejected:
        store.write_table(REJECTED, pa.Table.from_pylist(rejected, _REJECTED_SCHEMA))
    else:
        store.delete(REJECTED)
    description = source.describe()
    if before is not None and "splits" in description:
        description["splits"] = {**before.source.get("splits", {}), **description["splits"]}
    manifest = Manifest(
        name=request.name,
        kind="classification" if request.class_names else "captions",
        class_names=tuple(request.class_names),
        raw_names=tuple(source.class_names),
        splits=splits,
        source=description,
        notes=tuple(dict.fromkeys(notes)),
        recipe=RECIPE,
        rayclip=__version__,
    )
    store.write(MANIFEST, manifest.to_json().encode())
    for shard in (shard for progress in done.values() for shard in progress.shards):
        store.delete(part_name(shard.file))
    journal.splits = {split: progress for split, progress in journal.splits.items() if not progress.done}
    if journal.splits:
        journal.write(store)
    else:
        store.delete(JOURNAL)
    return manifest


def _describe(request: Request, split: str, progress: _Progress, store: Store) -> Split:
    parts = [np.load(io.BytesIO(store.read(part_name(s.file)) or b""), allow_pickle=False) for s in progress.shards]
    index = np.concatenate(parts)
    data = npy_bytes(index)
    file = File(file=f"index-{split}.npy", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.write(file.file, data)
    classes = len(request.class_names)
    return Split(
        rows=len(index),
        rejected=len(progress.rejected),
        converted=progress.converted,
        per_class=tuple(np.bincount(index["label"], minlength=classes).tolist()) if classes else (),
        size=None if progress.sizes_differ else progress.size,
        shards=tuple(ShardFile(**shard.model_dump(exclude={"part"})) for shard in progress.shards),
        index=file,
    )

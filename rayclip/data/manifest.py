"""`manifest.json`, the description of a prepared data set. It is written last, so a data set with one is complete."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rayclip.store import Store
from rayclip.types import UserError

MANIFEST = "manifest.json"
RECIPE = 1  # raise it with any change to what `prepare` writes for the same source

Kind = Literal["classification", "captions"]
Names = Literal["curated", "raw"]
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a plain name: a manifest must not refer outside its folder
_NAME = re.compile(r"[^./\\\0][^/\\\0]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM = "sha256"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file beside the manifest: its name, size in bytes and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardFile(File):
    """A Parquet file of `rows` images; `content` is the SHA-256 of images and labels (or captions) alone."""

    rows: int
    content: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split as stored on disk.

    Attributes:
        rows: number of images.
        rejected: number of the source's records that were set aside, see `rejected.parquet`.
        converted: number of converted images, by their original kind.
        per_class: images per class, in label order; empty for captions.
        size: (width, height) of all images, None if they differ.
        shards: in row order.
        index: a `.npy` file with each image's label and offset (`mapped.INDEX`).
    """

    rows: int
    rejected: int
    converted: Mapping[str, int]
    per_class: tuple[int, ...]
    size: tuple[int, int] | None
    shards: tuple[ShardFile, ...]
    index: File

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.shards, self.index)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set.

    Attributes:
        class_names: CLIP's curated spelling, in label order.
        raw_names: the source's own spelling.
        source: description of its source (`Source.describe`).
        notes: remarks for users, one sentence each.
        recipe: version of the preparation, `RECIPE`.
        rayclip: version of the package.
    """

    name: str
    kind: Kind
    class_names: tuple[str, ...]
    raw_names: tuple[str, ...]
    splits: Mapping[str, Split]
    source: Mapping[str, Any]
    notes: tuple[str, ...]
    recipe: int
    rayclip: str

    def fingerprint(self, split: str) -> str:
        """Hash a split's images and labels; equal wherever and from whichever source it was prepared."""
        return hashlib.sha256("".join(s.content for s in self.splits[split].shards).encode()).hexdigest()[:16]

    def names(self, names: Names) -> tuple[str, ...]:
        return self.class_names if names == "curated" else self.raw_names

    def notes_on(self, split: str) -> tuple[str, ...]:
        """Return the remarks on a split for readers of its numbers."""
        found = self.splits[split]
        aside = (
            f"{found.rejected:,} of the {found.rows + found.rejected:,} {split} images of '{self.name}' were set aside "
            "when it was prepared (rejected.parquet says why)."
        )
        others = tuple(n for n in self.notes if not any(f"{s} split" in n for s in self.splits if s != split))
        return (aside, *others) if found.rejected else others

    def to_json(self) -> str:
        raw = json.loads(json.dumps(dataclasses.asdict(self)))
        return json.dumps({**raw, _SUM: _sum(raw)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse and validate a manifest.

        Raises:
            UserError: something is missing, of the wrong type, or inconsistent.
        """
        try:
            return _manifest(json.loads(text))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UserError(
                f"{where} is no manifest of a prepared data set ({what}): prepare it again with --force."
            ) from error


def read_manifest(store: Store) -> Manifest | None:
    """Read the manifest in a data set's folder; None if there is none.

    Raises:
        UserError: the manifest is damaged.
    """
    text = store.read(MANIFEST)
    return None if text is None else Manifest.from_json(text, f"{store.root}/{MANIFEST}")


def _manifest(raw: Any) -> Manifest:
    _is(raw, dict, "a manifest")
    recipe = _count(raw["recipe"], "recipe")
    if recipe != RECIPE:
        raise ValueError(f"it has the layout version {recipe}, this program reads {RECIPE}")
    kind = raw["kind"]
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}")
    class_names, raw_names = _strings(raw["class_names"], "class_names"), _strings(raw["raw_names"], "raw_names")
    if len(class_names) != len(raw_names) or bool(class_names) != (kind == "classification"):
        raise ValueError(f"{len(class_names)} class names and {len(raw_names)} raw names for {kind}")
    splits = {str(k): _split(v, str(k), len(class_names)) for k, v in _is(raw["splits"], dict, "splits").items()}
    if not splits:
        raise ValueError("it has no splits")
    for name in (raw["name"], *splits):  # files are named after them
        if not _NAME.fullmatch(_is(name, str, "name")):
            raise ValueError(f"'{name}' cannot be the name of a data set or a split")
    manifest = Manifest(
        name=raw["name"],
        kind=kind,
        class_names=class_names,
        raw_names=raw_names,
        splits=splits,
        source=_is(raw["source"], dict, "source"),
        notes=_strings(raw["notes"], "notes"),
        recipe=recipe,
        rayclip=_is(raw["rayclip"], str, "rayclip"),
    )
    # A changed class name, shard order or split name changes results but is not inconsistent: only the hash detects it.
    if raw[_SUM] != _sum(raw):
        raise ValueError("it was changed after it was written")
    return manifest


def _sum(raw: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content, independent of spacing and key order in the file."""
    return hashlib.sha256(json.dumps({k: v for k, v in raw.items() if k != _SUM}, sort_keys=True).encode()).hexdigest()


def _split(raw: Any, name: str, classes: int) -> Split:
    _is(raw, dict, f"split '{name}'")
    shards = tuple(
        ShardFile(**_file(s), rows=_count(s["rows"], "rows"), content=_sha256(s["content"]))
        for s in _is(raw["shards"], list, f"shards of '{name}'")
    )
    per_class = tuple(_count(c, "per_class") for c in _is(raw["per_class"], list, "per_class"))
    rows, size = _count(raw["rows"], "rows"), raw["size"]
    if rows == 0 or sum(s.rows for s in shards) != rows or (classes and sum(per_class) != rows):
        raise ValueError(f"the rows of split '{name}' do not add up")
    if len(per_class) != classes:
        raise ValueError(f"split '{name}' counts {len(per_class)} classes of {classes}")
    if size is not None and (not isinstance(size, list) or len(size) != 2 or min(_count(s, "size") for s in size) < 1):
        raise ValueError(f"size of split '{name}' is {size!r}")
    return Split(
        rows=rows,
        rejected=_count(raw["rejected"], "rejected"),
        converted={str(k): _count(v, "converted") for k, v in _is(raw["converted"], dict, "converted").items()},
        per_class=per_class,
        size=None if size is None else (size[0], size[1]),
        shards=shards,
        index=File(**_file(raw["index"])),
    )


def _file(raw: Any) -> dict[str, Any]:
    file = _is(_is(raw, dict, "a file")["file"], str, "a file's name")
    if not _FILE_NAME.fullmatch(file):
        raise ValueError(f"'{file}' is not a plain file name")
    return {"file": file, "bytes": _count(raw["bytes"], "bytes"), "sha256": _sha256(raw["sha256"])}


def _sha256(value: Any) -> str:
    if not _SHA256.fullmatch(_is(value, str, "sha256")):
        raise ValueError(f"'{value}' is no SHA-256")
    return value


def _is(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{what} is {type(value).__name__}, not {kind.__name__}")
    return value


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{what} is {value!r}, not a count")
    return value


def _strings(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_is(v, str, f"an entry of {what}") for v in _is(value, list, what))

"""`manifest.json`, the description of a prepared data set. It is written last, so a data set with one is complete."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from rayclip.store import Store
from rayclip.types import UserError

MANIFEST = "manifest.json"
SAVED = "adversarial"  # kind of the source of saved adversarial images (`evaluation.saving`)
RECIPE = 1  # raise it with any change to what `prepare` writes for the same source

Kind = Literal["classification", "captions"]
Names = Literal["curated", "raw"]
# A manifest must not refer outside its folder: files lie beside it, some are named after the data set and its splits.
_Name = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SUM = "sha256"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class File(_Model):
    """A file beside the manifest: its name, size in bytes and SHA-256."""

    file: _FileName
    bytes: NonNegativeInt
    sha256: _Sha256


class ShardFile(File):
    """A Parquet file of `rows` images; `content` is the SHA-256 of images and labels (or captions) alone."""

    rows: NonNegativeInt
    content: _Sha256


class Split(_Model):
    """One split as stored on disk.

    Attributes:
        rejected: number of the source's records that were set aside, see `rejected.parquet`.
        converted: number of converted images, by their original kind.
        per_class: images per class, in label order; empty for captions.
        size: (width, height) of all images, None if they differ.
        index: a `.npy` file with each image's label and offset (`mapped.INDEX`).
    """

    rows: PositiveInt
    rejected: NonNegativeInt
    converted: dict[str, NonNegativeInt]
    per_class: tuple[NonNegativeInt, ...]
    size: tuple[PositiveInt, PositiveInt] | None
    shards: tuple[ShardFile, ...]
    index: File

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.shards, self.index)

    @model_validator(mode="after")
    def _adds_up(self) -> "Split":
        if sum(s.rows for s in self.shards) != self.rows or (self.per_class and sum(self.per_class) != self.rows):
            raise ValueError("the rows do not add up")
        return self


class Manifest(_Model):
    """A prepared data set.

    Attributes:
        class_names, raw_names: CLIP's curated spelling and the source's own, in label order.
        source: description of its source (`Source.describe`).
        notes: remarks for users, one sentence each.
        recipe: version of the preparation, `RECIPE`.
    """

    name: _Name
    kind: Kind
    class_names: tuple[str, ...]
    raw_names: tuple[str, ...]
    splits: dict[_Name, Split] = Field(min_length=1)
    source: dict[str, Any]
    notes: tuple[str, ...]
    recipe: NonNegativeInt
    rayclip: str

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        if self.recipe != RECIPE:
            raise ValueError(f"it has the layout version {self.recipe}, this program reads {RECIPE}")
        if len(self.class_names) != len(self.raw_names) or bool(self.class_names) != (self.kind == "classification"):
            raise ValueError(f"{len(self.class_names)} class names, {len(self.raw_names)} raw names for {self.kind}")
        for name, split in self.splits.items():
            if len(split.per_class) != len(self.class_names):
                raise ValueError(f"split '{name}' counts {len(split.per_class)} classes of {len(self.class_names)}")
        return self

    def fingerprint(self, split: str) -> str:
        """Hash a split's images and labels; equal wherever and from whichever source it was prepared."""
        return hashlib.sha256("".join(s.content for s in self.splits[split].shards).encode()).hexdigest()[:16]

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
        raw = self.model_dump(mode="json")
        return json.dumps({**raw, SUM: checksum(raw)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse and validate a manifest. Raises `UserError` if something is missing, wrong or inconsistent."""
        try:
            manifest, raw = cls.model_validate_json(text), json.loads(text)
            # A changed class name, shard order or split name is not inconsistent: only the hash detects it.
            if raw.get(SUM) != checksum(raw):
                raise ValueError("it was changed after it was written")
        except (ValidationError, ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is no manifest of a prepared data set ({_reason(error)}): prepare it again with --force."
            ) from error
        return manifest


def read_manifest(store: Store) -> Manifest | None:
    """Read the manifest in a data set's folder; None if there is none. Raises `UserError` if it is damaged."""
    text = store.read(MANIFEST)
    return None if text is None else Manifest.from_json(text, f"{store.root}/{MANIFEST}")


def open_manifest(store: Store) -> Manifest:
    """Return the manifest of a data set. Raises `UserError` if it is missing or cannot be read."""
    try:
        manifest = read_manifest(store)
    except OSError as error:
        raise UserError(f"{store.root} cannot be read: {str(error).splitlines()[0]}") from error
    if manifest is None:
        raise UserError(f"{store.root} holds no prepared data set: it has no {MANIFEST}.")
    return manifest


def checksum(raw: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a file's content but for its entry `sha256`, independent of spacing and key order."""
    return hashlib.sha256(json.dumps({k: v for k, v in raw.items() if k != SUM}, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Return what is wrong, in one line whatever the manifest holds."""
    reason = str(error) or type(error).__name__
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = "missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        reason = f"{place}: {said}" if place else said
    return " ".join(reason.split())

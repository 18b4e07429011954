"""Find the columns of a table that hold images, labels and captions, and interpret label columns."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyarrow import types

from rayclip.data.labels import MISSING, check_labels, first_few, with_given_names
from rayclip.data.spec import Reading
from rayclip.types import UserError

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "coarse_label", "cls", "class", "target")
CAPTIONS = ("captions", "caption", "sentences", "text", "raw")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns to read. Exactly one of `label` and `captions` is given."""

    image: str
    label: str | None
    captions: str | None
    text_labels: bool

    @property
    def names(self) -> list[str]:
        return [c for c in (self.image, self.label, self.captions) if c]


def find_columns(
    where: str, schema: pa.Schema, reading: Reading, *, captions: bool = False, option: str = "--{}-column {}"
) -> Columns:
    """Find the columns to read: those that `reading` names, else `image` and `label`, else the only one that fits.

    Args:
        where: the file, for messages.
        captions: whether to read captions even if there are labels.
        option: how to name a column, for messages; filled with `image` or `label`, and the column.

    Raises:
        UserError: no such column, or several candidates.
    """
    columns = f"its columns: {', '.join(schema.names)}"
    features = declared_features(schema)

    def choose(
        what: str, asked: str | None, known: Sequence[str], fits: Callable[[Any], bool], kind: str
    ) -> str | None:
        def usable(column: str) -> bool:
            return schema.names.count(column) == 1 and fits(schema.field(column).type)

        if asked is not None:
            if not usable(asked):
                raise UserError(f"{where} has no column '{asked}' that can be the {what} ({columns}).")
            return asked
        if known[0] in schema.names:
            return known[0] if usable(known[0]) else None
        declared = [c for c, f in features.items() if isinstance(f, dict) and f.get("_type") == kind and usable(c)]
        structs = [c for c in schema.names if types.is_struct(schema.field(c).type) and usable(c)]
        for found in ([c for c in known if usable(c)], declared, structs):
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f"{where} has the columns {' and '.join(found)}, and each could be the {what}: choose with "
                    f"{' or '.join(option.format(what, c) for c in found)}."
                )
        return None

    image = choose("image", reading.image, IMAGES, lambda kind: is_image(kind) or is_text(kind), "Image")
    if image is None:
        raise UserError(
            f"{where} has no image column ({columns}): name it with {option.format('image', 'COLUMN')}; it must hold "
            "encoded images as struct<bytes, path> or binary, or paths of image files."
        )
    label = (
        None if captions else choose("label", reading.label, LABELS, lambda k: is_number(k) or is_text(k), "ClassLabel")
    )
    if label is not None:
        return Columns(image=image, label=label, captions=None, text_labels=is_text(schema.field(label).type))
    found = next((c for c in CAPTIONS if schema.names.count(c) == 1 and is_captions(schema.field(c).type)), None)
    if found is None:
        wanted = "captions, a column 'captions'" if captions else "labels or captions, a column 'label' or 'captions'"
        other = "" if captions else f": name the one of numbers or texts with {option.format('label', 'COLUMN')}"
        raise UserError(f"{where} has no {wanted} ({columns}){other}.")
    return Columns(image=image, label=None, captions=found, text_labels=False)


def declared_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the description of the columns that the datasets library wrote into the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def declared_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """Return the class names in the schema's metadata; empty if there are none."""
    feature = declared_features(schema).get(label or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """How the values of a label column become labels.

    Attributes:
        own_names: as the data spell them; empty if they have none.
        texts: the class name of each label where labels are texts; a text that is no class name may still be a number.
        first: the label of the first class.
        from_1: advice where labels seem to be counted from 1.
        note: remark for users if given names replace the data's own.
    """

    name: str
    class_names: tuple[str, ...]
    own_names: tuple[str, ...]
    texts: tuple[str, ...]
    first: int
    from_1: str
    note: str | None

    @cached_property
    def _seen(self) -> dict[Any, int]:
        return {}

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts, start=self.first)}

    def numbers(self, where: str, distinct: Iterable[Any]) -> dict[Any, int]:
        """Map each distinct value of the column to its label, counted as in the data; `MISSING` for missing labels.
        Raises `UserError` for values that are no labels, or labels of no class."""
        numbers: dict[Any, int] = {}
        wrong = []
        for value in distinct:
            try:
                numbers[value] = self._number(value)
            except (ValueError, OverflowError) as error:
                wrong.append(str(error))
        if wrong:
            raise UserError(f"{where} has labels in its column '{self.name}' that name no class: {first_few(wrong)}.")
        check_labels(where, numbers.values(), len(self.class_names), self.first, self.from_1)
        return numbers

    def number(self, where: str, value: Any) -> int:
        """Return the label of one value; see `numbers`."""
        if value not in self._seen:
            self._seen.update(self.numbers(where, [value]))
        return self._seen[value]

    def _number(self, value: Any) -> int:
        if value is None or value != value:
            return MISSING
        if isinstance(value, str):
            if value in self._number_of:
                return self._number_of[value]
            if not value.strip().lstrip("-").isdecimal():
                raise ValueError(f"the text '{value[:40]}' is none of the class names")
            value = int(value)
        if value != int(value):
            raise ValueError(f"{value} is no whole number")
        return int(value)


def open_labels(
    where: str,
    columns: Columns,
    declared: tuple[str, ...],
    distinct: Iterable[Any] | None,
    reading: Reading,
    *,
    from_1: str,
    names_option: str = "",
) -> LabelColumn:
    """Choose the class names of a label column: those declared, else those given, else its distinct texts (None if they
    are not known), sorted like class folders. Raises `UserError` if there are none."""
    given, own = reading.class_names(), declared
    if not own and given is None and columns.text_labels and distinct is not None:
        own = tuple(sorted(str(text) for text in distinct if text is not None))
    if not own and given is None:
        raise UserError(
            f"{where} names no classes: give --class-names FILE, one name per line in label order{names_option}; the "
            f"datasets library writes them as a ClassLabel for '{columns.label}' under the key 'huggingface' of the "
            "schema metadata."
        )
    names, note = (own, None) if given is None else with_given_names(own, given, str(reading.names))
    return LabelColumn(
        name=str(columns.label),
        class_names=names,
        own_names=own,
        texts=(own or names) if columns.text_labels else (),
        first=reading.labels_from,
        from_1=from_1,
        note=note,
    )


def caption_texts(value: Any) -> tuple[str, ...]:
    """Return the captions of a value: one or several, as text or as structs with `raw`; "" for a missing one."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple((v.get("raw") if isinstance(v, dict) else v) or "" for v in values)


def is_text(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: Any) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_number(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def is_image(kind: Any) -> bool:
    """Return whether a column type can hold encoded images, or is a struct with paths of image files."""
    if types.is_struct(kind):
        has = {name: kind.field(name).type for name in ("bytes", "path") if kind.get_field_index(name) >= 0}
        if "bytes" in has and not types.is_null(has["bytes"]):
            return is_bytes(has["bytes"])
        return "path" in has and is_text(has["path"])
    return is_bytes(kind)


def is_captions(kind: Any) -> bool:
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return kind.get_field_index("raw") >= 0 and is_text(kind.field("raw").type)
    return is_text(kind)

"""Find the columns of a table that hold images, labels and captions, and their class names."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import types

from rayclip.data.labels import Labels, Reading
from rayclip.types import UserError

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "coarse_label", "cls", "class", "target")
CAPTIONS = ("captions", "caption", "sentences", "text", "raw")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns to read, one of `label` and `captions`; `declared` are the class names in the schema's metadata."""

    image: str
    label: str | None = None
    captions: str | None = None
    text_labels: bool = False
    declared: tuple[str, ...] = ()


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

    def choose(
        what: str, asked: str | None, known: Sequence[str], fits: Callable[[Any], bool], kind: str
    ) -> str | None:
        usable = [c for c in schema.names if schema.names.count(c) == 1 and fits(schema.field(c).type)]
        if asked is not None:
            if asked not in usable:
                raise UserError(f"{where} has no column '{asked}' that can be the {what} ({columns}).")
            return asked
        if known[0] in schema.names:
            return known[0] if known[0] in usable else None
        declared = [c for c, feature in _features(schema).items() if feature.get("_type") == kind and c in usable]
        structs = [c for c in usable if types.is_struct(schema.field(c).type)]
        for found in ([c for c in known if c in usable], declared, structs):
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
        text_labels = is_text(schema.field(label).type)
        return Columns(image=image, label=label, text_labels=text_labels, declared=declared_names(schema, label))
    found = next((c for c in CAPTIONS if schema.names.count(c) == 1 and is_captions(schema.field(c).type)), None)
    if found is None:
        wanted = "captions, a column 'captions'" if captions else "labels or captions, a column 'label' or 'captions'"
        other = "" if captions else f": name the one of numbers or texts with {option.format('label', 'COLUMN')}"
        raise UserError(f"{where} has no {wanted} ({columns}){other}.")
    return Columns(image=image, captions=found)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the description of the columns that the datasets library wrote into the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: feature for column, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def declared_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Return the class names in the schema's metadata; empty if there are none."""
    names = _features(schema).get(label, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def check_alike(where: object, columns: Columns, first: object, wanted: Columns) -> None:
    """Raise a `UserError` unless a file has the same columns and class names as the first."""
    if columns != wanted:
        raise UserError(f"{where} names other classes or columns than {first}: give each file by itself.")


def open_labels(
    where: str,
    columns: Columns,
    distinct: Iterable[Any] | None,
    reading: Reading,
    *,
    from_1: str,
    names_option: str = "",
) -> Labels:
    """Choose the class names of a label column: those declared, else those given, else its distinct texts (None if they
    are not known), sorted like class folders. Raises `UserError` if there are none."""
    own = columns.declared
    if not own and reading.names is None and columns.text_labels and distinct is not None:
        own = tuple(sorted(str(text) for text in distinct if text is not None))
    if not own and reading.names is None:
        raise UserError(
            f"{where} names no classes: give --class-names FILE, one name per line in label order{names_option}; the "
            f"datasets library writes them as a ClassLabel for '{columns.label}' under the key 'huggingface' of the "
            "schema metadata."
        )
    return Labels.choose(own, reading, from_1=from_1, texts=columns.text_labels, column=str(columns.label))


def caption_texts(value: Any) -> tuple[str, ...]:
    """Return the captions of a value: one or several, as text or as structs with `raw`; "" for a missing one."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple((v.get("raw") if isinstance(v, dict) else v) or "" for v in values)


def is_text(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_number(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def is_image(kind: Any) -> bool:
    """Return whether a column type can hold encoded images, or is a struct with paths of image files."""
    if types.is_struct(kind):
        has = {name: kind.field(name).type for name in ("bytes", "path") if kind.get_field_index(name) >= 0}
        if "bytes" not in has or types.is_null(has["bytes"]):
            return "path" in has and is_text(has["path"])
        kind = has["bytes"]
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_captions(kind: Any) -> bool:
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return kind.get_field_index("raw") >= 0 and is_text(kind.field("raw").type)
    return is_text(kind)

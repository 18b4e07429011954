"""Find the columns of a table that hold images, labels and captions, and interpret label columns. Preparing and reading
share these rules."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types

from rayclip.data.labels import MISSING, some
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
        option: format of the option that names a column, for messages; filled with `image` or `label`, and the column.

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


def class_number(value: Any, number_of: Mapping[str, int]) -> int | None:
    """Convert a label to a whole number, counted as in the data; None for a missing label.

    Args:
        value: a number, a boolean, or a text.
        number_of: text -> label; a text that is no class name may still be a number.

    Raises:
        ValueError: not a label; the message says why.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        if value in number_of:
            return number_of[value]
        if not value.strip().lstrip("-").isdecimal():
            raise ValueError(f"the text '{value[:40]}' is none of the class names")
        value = int(value)
    if value != int(value):
        raise ValueError(f"{value} is no whole number")
    return None if int(value) == MISSING else int(value)


def numbers_of(where: str, column: str, distinct: Iterable[Any], number_of: Mapping[str, int]) -> dict[Any, int]:
    """Map each distinct value of a column to its label, counted as in the data; `MISSING` for missing labels.

    Raises:
        UserError: some values are no labels.
    """
    numbers: dict[Any, int] = {}
    wrong = []
    for value in distinct:
        try:
            number = class_number(value, number_of)
        except (ValueError, OverflowError) as error:
            wrong.append(str(error))
        else:
            numbers[value] = MISSING if number is None else number
    if wrong:
        raise UserError(f"{where} has labels in its column '{column}' that name no class: {some(wrong)}.")
    return numbers


def class_numbers(where: str, column: str, values: pa.ChunkedArray, number_of: Mapping[str, int]) -> np.ndarray:
    """Convert a whole column to labels, `(N,)` int64, counted as in the data; `MISSING` for rows without one.

    Raises:
        UserError: some values are no labels.
    """
    numbers = numbers_of(where, column, values.unique().to_pylist(), number_of)
    if types.is_integer(values.type) and not values.null_count:
        return values.to_numpy().astype(np.int64)
    return np.array([numbers.get(v, MISSING) for v in values.to_pylist()], dtype=np.int64)


def is_text(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: Any) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_number(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def is_label(kind: Any) -> bool:
    return is_number(kind) or is_text(kind)


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

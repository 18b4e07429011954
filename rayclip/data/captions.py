"""Tables of the captions selected for a data set's classes, which people can read and edit.

One row per caption: `class_index, class_name, rank, caption, score, source`. The file's ending selects Parquet or CSV,
with the same columns; the table's origin is stored in Parquet's schema metadata, or beside a CSV in `FILE.csv.json`.
All rows of a file are used, so edit by deleting, changing or adding rows. `class_index` and `caption` are required.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, NonNegativeInt, ValidationError

from rayclip.data.descriptions import normal_name
from rayclip.data.labels import first_few
from rayclip.data.spec import parse_spec
from rayclip.paths import expand_home
from rayclip.settings import Configurable
from rayclip.store import Store
from rayclip.types import UserError

C = TypeVar("C", bound=Configurable)

# Tables bundled with the package, by data set. The digits have eight sentences per class, written for this purpose;
# ranks and scores are those of `rayclip captions filter` with the model `digits`.
BUNDLED = {"digits": Path(__file__).with_name("digits_captions.csv")}

_METADATA = b"rayclip_captions"
_SHOWN = 60  # characters of a wrong value that an error shows
_SCHEMA = pa.schema(
    [
        ("class_index", pa.int64()),
        ("class_name", pa.string()),
        ("rank", pa.int64()),
        ("caption", pa.string()),
        ("score", pa.float64()),
        ("source", pa.string()),
    ]
)


class Caption(BaseModel, frozen=True, coerce_numbers_to_str=True):
    """One row of a table.

    Attributes:
        class_index: the label.
        class_name: to detect a file for other classes; "" if an editor left it out.
        rank: 1 is the best of its class; None if an editor left it out.
        score: cosine similarity of its text embedding to the class name's; None if not measured.
        source: `description` (from the file of descriptions), `template` (to fill up the class), or an editor's text.
    """

    class_index: NonNegativeInt
    class_name: str = ""
    rank: int | None = None
    caption: str
    score: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class CaptionTable:
    """Rows sorted by class and rank; `made_from` is the origin stored with the file, which some editors remove."""

    rows: tuple[Caption, ...]
    made_from: Mapping[str, Any]


def check_table_name(path: Path) -> None:
    """Raise a `UserError` unless `path` is a valid table name: `.parquet` or `.csv` in an existing folder."""
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise UserError(f"{path}: captions are written as .parquet or .csv.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}.")


def write_captions(path: Path, rows: Sequence[Caption], made_from: Mapping[str, Any]) -> None:
    """Write a table as `.parquet` or `.csv`, atomically. `class_names` in `made_from`, a JSON object, lets
    `read_captions` detect a deleted class."""
    check_table_name(path)
    store, records = Store(str(path.absolute().parent)), [row.model_dump() for row in rows]
    try:
        if path.suffix.lower() == ".csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, _SCHEMA.names)
            writer.writeheader()
            writer.writerows(records)
            store.write_json(_beside(path).name, made_from)
            store.write(path.name, text.getvalue().encode("utf-8-sig"))  # without the mark Excel misreads UTF-8
        else:
            schema = _SCHEMA.with_metadata({_METADATA: json.dumps(made_from)})
            store.write_table(path.name, pa.Table.from_pylist(records, schema))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def table_for(captions: str, data: str) -> str:
    """Return the caption table of a data set: `captions` itself, or, if that is a folder, its `NAME.parquet` or
    `NAME.csv`. Raises `UserError` if there is none."""
    captions = captions if captions in BUNDLED else expand_home(captions)
    if captions in BUNDLED or not Path(captions).is_dir():
        return captions
    name = Path(parse_spec(data).place).stem
    for file in (Path(captions) / f"{name}{ending}" for ending in (".parquet", ".csv")):
        if file.is_file():
            return str(file)
    raise UserError(f"folder {captions} has no captions of '{name}': it needs {name}.parquet or {name}.csv.")


def bind_captions(owner: C, data: str, class_names: Sequence[str], other_names: Sequence[str] = ()) -> C:
    """Return an attack, a method, a defence or a scorer with the captions that it needs (`captions_needed`) read in.

    Args:
        data: the data set, as on the command line; `digits#holdout` has the captions of `digits`.
        other_names: another spelling of the classes (`ImageSet.other_names`), in which a table may name them.

    Raises:
        UserError: there are no captions, too few for a class, or a table that does not fit the classes.
    """
    name = data.partition("#")[0]
    captions = owner.captions_needed(name if name in BUNDLED else "")
    if not captions:
        return owner
    table = table_for(captions, data)
    return owner.with_texts(read_captions(table, class_names, other_names), class_names, table)


def read_captions(
    path: str | Path, class_names: Sequence[str] | None = None, other_names: Sequence[str] = ()
) -> list[list[str]]:
    """Read the captions of each class, in label order, best first.

    Args:
        path: a table, edited or not, or the name of a bundled one.
        class_names: the classes that the table must match; None for those that the file was made for.
        other_names: another spelling of them, which the table may have instead; empty for none.

    Raises:
        UserError: see `read_table`; or a class has no caption, or the file is for other classes.
    """
    table = read_table(path)
    made_for = table.made_from.get("class_names")
    is_list = isinstance(made_for, list) and all(isinstance(name, str) for name in made_for)
    names = (made_for if is_list else None) if class_names is None else class_names
    by_label: dict[int, list[str]] = {}
    for row in table.rows:
        by_label.setdefault(row.class_index, []).append(row.caption)
        if names is None:
            continue
        if row.class_index >= len(names):
            raise UserError(f"{path} has class {row.class_index}, but there are {len(names)} classes, 0 first.")
        expected = names[row.class_index]
        known = {normal_name(name) for name in (expected, *other_names[row.class_index : row.class_index + 1])}
        if row.class_name and normal_name(row.class_name) not in known:
            raise UserError(
                f"{path} has captions of '{row.class_name[:_SHOWN]}' as class {row.class_index}, which is "
                f"'{expected[:_SHOWN]}': "
                "it is of another data set, or the row's class_index is wrong."
            )
    count = max(by_label) + 1 if names is None else len(names)
    bare = [label for label in range(count) if label not in by_label]
    if bare:
        shown = first_few([str(label) if names is None else f"'{names[label]}'" for label in bare])
        raise UserError(f"{path} has no caption for {shown}: every class needs one.")
    return [by_label[label] for label in range(count)]


def read_table(path: str | Path) -> CaptionTable:
    """Read a table of captions that a person may have edited: rows in any order; ranks, scores and names optional.
    Raises `UserError`: the file is missing, damaged or has no captions, or a row is invalid (the message names it)."""
    path = BUNDLED.get(str(path), Path(expand_home(str(path))))
    if not path.is_file():
        raise UserError(f"no such file of captions: {path}.")
    columns, records, made_from = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    for column in ("class_index", "caption"):
        if column not in columns:
            raise UserError(f"{path} has no column '{column}': a table of captions needs class_index and caption.")
    rows = [_row(f"{path}, row {number}", record) for number, record in records]
    if not rows:
        raise UserError(f"{path} holds no captions.")
    for label in {row.class_index for row in rows}:
        names = {normal_name(row.class_name) for row in rows if row.class_index == label and row.class_name}
        if len(names) > 1:
            raise UserError(f"{path} gives class {label} several names: {', '.join(sorted(names))}.")
    rows.sort(key=lambda row: (row.class_index, math.inf if row.rank is None else row.rank))
    return CaptionTable(rows=tuple(rows), made_from=made_from if isinstance(made_from, dict) else {})


def _row(where: str, record: Mapping[str, Any]) -> Caption:
    # Spreadsheets and pandas write an empty cell as a blank text or NaN.
    tidy = {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in record.items() if key}
    try:
        return Caption.model_validate({k: v for k, v in tidy.items() if v is not None and v != "" and v == v})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column, missing = first["loc"][0], first["type"] == "missing"
        if missing and column == "caption":
            raise UserError(f"{where} has no caption: write one or delete the row.") from None
        said = "is missing" if missing else f"'{str(first['input'])[:_SHOWN]}': {first['msg']}"
        raise UserError(f"{where}: {column} {said}.") from None


def _read_csv(path: Path) -> tuple[Sequence[str], Iterable[tuple[int, dict[str, Any]]], Any]:
    """Return the columns, the rows, numbered as a spreadsheet shows them, and the table's origin."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        made_from = json.loads(_beside(path).read_bytes()) if _beside(path).exists() else {}
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it from your editor as 'CSV UTF-8'.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{_beside(path)} is damaged: delete it or write {path} again.") from None
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets use the delimiter of their locale
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = list(enumerate(reader, 2))
    except csv.Error as error:
        raise UserError(f"{path} is no table in CSV ({error}): write it again.") from None
    filled = ((n, r) for n, r in rows if any(isinstance(v, str) and v.strip() for v in r.values()))
    return reader.fieldnames or [], filled, made_from


def _read_parquet(path: Path) -> tuple[Sequence[str], Iterable[tuple[int, dict[str, Any]]], Any]:
    try:
        table = pq.read_table(path)
        made_from = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None
    return table.column_names, enumerate(rows, start=1), made_from


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")

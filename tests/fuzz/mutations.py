"""Strategies that damage a file: any file, JSON, lines of text, Parquet, safetensors, tars; pickles made to do harm.

Each takes the bytes of a sound file and draws those of a damaged one.
"""

import copy
import datetime
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

Strategy = st.SearchStrategy[bytes]
OUTSIDE = "../secret"  # a file beside the folder that is read; nobody may read it or write there


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


NUMBERS = [
    -1,
    0,
    1,
    7,
    1000,
    30_000,
    10**6,
    2**31,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]
TEXTS = [
    "",
    "x",
    "a\nb",
    "é\u202e",
    "\ud800",
    "\0",
    "0" * 64,
    "9" * 5000,
    OUTSIDE,
    "/etc/passwd",
    "C:\\x",
    "%s{}",
    "1/0",
]
ODD = [None, True, *NUMBERS, *TEXTS, [], [1], [[]], {}, {"a": []}, deep(200)]
JUNK = [b"", b"\0", b"\xff", b"\0" * 600, b"null", b"[]", b"{}", b"NaN", b"1", b'"x"', b"[" * 100_000, b"9" * 5000]
JUNK += [b'{"a":' * 50_000, b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"PK\x03\x04", b"PAR1"]
ENCODINGS = ["utf-16", "utf-8-sig", "utf-32", "utf-7", "cp037"]


@st.composite
def bytes_of(draw: Any, sound: bytes) -> bytes:
    """One to four accidents to the bytes of a file: bits, lengths, what is cut, doubled, left out or put in."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        act = draw(st.sampled_from(["bit", "bit", "byte", "number", "cut", "drop", "twice", "put", "zero", "swap"]))
        size = min(draw(st.sampled_from([1, 2, 4, 8, 64, 512])), max(1, len(data) - at))
        if act == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif act == "byte" and data:
            data[at] = draw(st.sampled_from([0, 1, 0x20, 0x30, 0x7F, 0x80, 0xFF]))
        elif act == "number":
            kind = draw(st.sampled_from(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
            top = 256 ** struct.calcsize(kind)
            new = struct.pack(kind, draw(st.sampled_from([0, 1, top // 2 - 1, top // 2, top - 1, top // 16])))
            data[at : at + len(new)] = new
        elif act == "cut":
            del data[at:]
        elif act == "drop":
            del data[at : at + size]
        elif act == "twice":
            data[at:at] = data[at : at + size]
        elif act == "put":
            data[at:at] = draw(st.sampled_from(JUNK))
        elif act == "zero":
            data[at : at + size] = bytes(size)
        else:
            other = draw(st.integers(0, max(0, len(data) - size)))
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    return bytes(data)


def places(raw: object) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON value."""
    found: list[tuple[Any, ...]] = []
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        found += [(key,), *((key, *rest) for rest in places(value))]
    return found


@st.composite
def changed_value(draw: Any, sound: Any) -> Any:
    """A JSON value in which one to three things are others."""
    raw = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        ways = places(raw)
        if not ways:
            break
        way = draw(st.sampled_from(ways))
        parent: Any = raw
        for key in way[:-1]:
            parent = parent[key]
        key, value = way[-1], parent[way[-1]]
        act = draw(
            st.sampled_from(["drop", "odd", "odd", "near", "reverse", "twice", "rename", "swap", "wrap", "text"])
        )
        if act == "drop":
            del parent[key]
        elif act == "near" and isinstance(value, int):
            parent[key] = value + draw(st.sampled_from([-1, 1, 1000]))
        elif act == "near" and isinstance(value, str) and value:
            at = draw(st.integers(0, len(value) - 1))
            parent[key] = value[:at] + draw(st.sampled_from("0a/ .é")) + value[at + 1 :]
        elif act == "reverse" and isinstance(value, list):
            value.reverse()
        elif act == "twice" and isinstance(value, list) and value:
            value.append(copy.deepcopy(draw(st.sampled_from(value))))
        elif act == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["test", "train", "val", "other", *TEXTS]))] = parent.pop(key)
        elif act == "swap" and isinstance(parent, dict):
            other = draw(st.sampled_from(sorted(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        elif act == "wrap":
            parent[key] = draw(st.sampled_from([[value], {"x": value}, {"name": value}]))
        elif act == "text":
            parent[key] = str(value)
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return raw


@st.composite
def said_otherwise(draw: Any, sound: Any, seal: Callable[[Any], Any] = lambda raw: raw) -> bytes:
    """JSON that says something else, some of it with a key twice; `seal` may renew its checksum."""
    raw = draw(changed_value(sound))
    text = json.dumps(seal(raw) if draw(st.booleans()) else raw)
    if draw(st.integers(0, 9)) == 0 and '"' in text:
        key = draw(st.sampled_from([way[-1] for way in places(sound) if isinstance(way[-1], str)] or ["x"]))
        text = text.replace(f'"{key}":', f'"{key}": {json.dumps(draw(st.sampled_from(ODD)))}, "{key}":')
    return text.encode()


@st.composite
def lines_of(draw: Any, sound: bytes) -> bytes:
    """A text whose lines are left out, doubled, cut, exchanged, or in another encoding."""
    act = draw(st.sampled_from(["drop", "twice", "swap", "join", "odd", "columns", "column", "encoding", "ends"]))
    lines = sound.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    if act == "encoding":
        return sound.decode().encode(draw(st.sampled_from(ENCODINGS)), "replace")
    if act == "ends":
        return sound.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\0", b"\xe2\x80\xa8"])))
    if act == "drop":
        del lines[at]
    elif act == "twice":
        lines.insert(at, lines[at])
    elif act == "swap":
        other = draw(st.integers(0, len(lines) - 1))
        lines[at], lines[other] = lines[other], lines[at]
    elif act == "join":
        lines[at] = lines[at].rstrip(b"\n")
    else:
        mark = draw(st.sampled_from([b",", b";", b"\t", b"#", b'"', b" "]))
        cells = lines[at].rstrip(b"\n").split(mark)
        if act == "columns":
            cells.reverse()
        else:
            odd = json.dumps(draw(st.sampled_from([*NUMBERS, *TEXTS]))).encode()
            cells[draw(st.integers(0, len(cells) - 1))] = odd
        lines[at] = mark.join(cells) + b"\n"
    return b"".join(lines)


def any_file(sound: bytes) -> Strategy:
    return st.one_of(bytes_of(sound), bytes_of(sound), bytes_of(sound), st.sampled_from(JUNK))


def text(sound: bytes) -> Strategy:
    return st.one_of(lines_of(sound), lines_of(sound), any_file(sound))


def json_file(sound: bytes, seal: Callable[[Any], Any] = lambda raw: raw) -> Strategy:
    said = said_otherwise(json.loads(sound), seal)
    written = st.builds(
        lambda indent, sort: json.dumps(json.loads(sound), indent=indent, sort_keys=sort).encode(),
        st.integers(0, 5),
        st.booleans(),
    )
    return st.one_of(said, said, said, said, text(sound), written)


def json_lines(sound: bytes) -> Strategy:
    lines = sound.splitlines()

    @st.composite
    def one_line(draw: Any) -> bytes:
        at = draw(st.integers(0, len(lines) - 1))
        new = draw(said_otherwise(json.loads(lines[at])))
        return b"\n".join([*lines[:at], new, *lines[at + 1 :], b""])

    return st.one_of(one_line(), one_line(), one_line(), text(sound))


# Parquet

_TYPES = [
    pa.int8(),
    pa.int64(),
    pa.uint64(),
    pa.float32(),
    pa.float64(),
    pa.string(),
    pa.binary(),
    pa.bool_(),
    pa.null(),
]
_TYPES += [pa.list_(pa.int64()), pa.struct([("bytes", pa.binary())]), pa.timestamp("ns"), pa.decimal128(38, 2)]
_CELLS = [None, float("nan"), 2**62, -(2**62), -1, 0, "", "x", b"\xff", True, [1], {"bytes": b""}]
_CELLS += [datetime.datetime(1, 1, 1), "é" * 100, OUTSIDE]


@st.composite
def table_of(draw: Any, sound: bytes) -> bytes:
    """A sound Parquet file with another table in it: other columns, types, values, rows or metadata."""
    table: Any = pq.read_table(io.BytesIO(sound))
    for _ in range(draw(st.integers(1, 2))):
        names = table.column_names
        if not names:
            break
        at = draw(st.integers(0, len(names) - 1))
        act = draw(
            st.sampled_from(
                ["drop", "swap", "type", "type", "value", "value", "rows", "none", "twice", "meta", "chunk"]
            )
        )
        if act == "drop":
            table = table.remove_column(at)
        elif act == "swap":
            other = draw(st.integers(0, len(names) - 1))
            names[at], names[other] = names[other], names[at]
            table = table.rename_columns(names)
        elif act == "twice":
            table = table.append_column(names[at], table.column(draw(st.integers(0, len(names) - 1))))
        elif act == "type":
            kind = draw(st.sampled_from(_TYPES))
            column = pa.nulls(len(table), kind)
            for old in (table.column(at), [str(x) for x in table.column(at).to_pylist()]):
                try:
                    column = pa.array(old.to_pylist() if isinstance(old, pa.ChunkedArray) else old).cast(kind)
                    break
                except (pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError):
                    pass
            table = table.set_column(at, names[at], column)
        elif act == "value" and len(table):
            values = table.column(at).to_pylist()
            values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from(_CELLS))
            for kind in (table.column(at).type, None):
                try:
                    table = table.set_column(at, names[at], pa.array(values, kind))
                    break
                except (pa.ArrowException, OverflowError, TypeError, ValueError):
                    pass
        elif act == "rows":
            table = draw(st.sampled_from([pa.concat_tables([table, table]), table.slice(1), table.slice(0, 1)]))
        elif act == "none":
            table = table.slice(0, 0)
        elif act == "meta":
            meta = dict(table.schema.metadata or {})
            key = draw(st.sampled_from([*sorted(meta), b"huggingface", b"rayclip"]))
            meta[key] = draw(bytes_of(meta[key]) if key in meta else st.sampled_from(JUNK))
            table = table.replace_schema_metadata(meta)
        else:
            table = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    sink = io.BytesIO()
    how = draw(
        st.sampled_from(
            [{}, {"compression": "none"}, {"compression": "gzip"}, {"row_group_size": 2}, {"version": "1.0"}]
        )
    )
    try:
        pq.write_table(table, sink, **how)
    except (pa.ArrowException, OverflowError, ValueError):
        return sound[: draw(st.integers(0, len(sound) - 1))]
    return sink.getvalue()


def parquet(sound: bytes) -> Strategy:
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    in_footer = bytes_of(sound[footer:-8]).map(
        lambda foot: sound[:footer] + foot + len(foot).to_bytes(4, "little") + b"PAR1"
    )
    return st.one_of(table_of(sound), table_of(sound), in_footer, any_file(sound))


# Weights


def safetensors(sound: bytes) -> Strategy:
    """The header of a safetensors file, with its length set right or not, or any of its bytes."""
    size = int.from_bytes(sound[:8], "little")
    header, body = json.loads(sound[8 : 8 + size]), sound[8 + size :]

    def put(said: bytes, length: int | None) -> bytes:
        return struct.pack("<Q", len(said) if length is None else length) + said + body

    lengths = st.sampled_from([None, None, None, None, 0, 1, size - 1, 10**8, 2**63, 2**64 - 1])
    inside = bytes_of(sound[8 : 8 + size])
    return st.one_of(
        st.builds(put, said_otherwise(header), lengths), st.builds(put, inside, lengths), any_file(sound[:4000])
    )


class Call:
    """Pickled, it is a call of `function`: what reads it as Python would, runs it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call

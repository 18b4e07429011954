"""What a kind of files is: a sound folder, how its files are damaged, and their reading."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzz import mutations as m
from rayclip.data import open_data
from rayclip.data.prepare import Layout

NAMES = ("cat", "dog", "lemon")
SMALL = Layout(shard=300, group=150)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A file of a kind, relative to its folder.

    Attributes:
        damage: what is done to the sound file.
        same: whether these bytes, in place of the sound ones, must give what the sound ones gave, or be refused.
        writes: whether reading changes the folder.
    """

    file: str
    damage: Callable[[bytes], m.Strategy]
    read: Callable[[Path], Any]
    same: Callable[[bytes, bytes], bool] = lambda sound, data: False
    writes: bool = False


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Files of one kind; `make` writes sound ones into a folder."""

    make: Callable[[Path], None]
    forms: tuple[Form, ...]


def always(sound: bytes, data: bytes) -> bool:
    return True


def unforged(sound: bytes, data: bytes) -> bool:
    """The checksum within is the sound file's."""
    return bool(json.loads(data)["sha256"] == json.loads(sound)["sha256"])


def png(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 2 * number % 256, 7)).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def image_bomb(side: int, colour: int, depth: int = 8) -> bytes:
    """A small PNG that unpacks to `side`² pixels; `colour` as in its header: 0 grey, 2 RGB, 3 palette, 6 RGBA."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = bytes(1 + side * {0: 1, 2: 3, 3: 1, 6: 4}[colour] * depth // 8)
    packer = zlib.compressobj(1)
    rows = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(3))) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def as_text(texts: Any) -> None:
    """What is read can be written down again."""
    json.dumps(texts, ensure_ascii=False).encode()


def snapshot(folder: Path) -> list[object]:
    """All that an evaluation or training takes from a prepared data set."""
    found: list[object] = []
    for role in ("train", "test"):
        data = open_data(str(folder), role)
        images = [np.asarray(i).tobytes() for i in data.images(range(len(data)))]
        found += [data.name, data.class_names, data.raw_names, data.labels.tolist(), data.ids.tolist(), images]
        found += [data.fingerprint, data.native_size, data.notes, data.resize]
    return found

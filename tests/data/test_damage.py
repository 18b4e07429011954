"""Bad input: damaged images, labels, manifests and shards are converted rightly, set aside and counted, or refused in
one sentence. Nothing crashes, nothing gets lost, nothing is read wrongly in silence."""

import io
import json
import re
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calling import call
from data import forms
from data.test_data import NAMES, png, write
from fuzz.kind import snapshot
from fuzz.of_data import seal
from rayclip.api.checks import Opened
from rayclip.data import open_data
from rayclip.data.manifest import MANIFEST, Manifest
from rayclip.data.prepare import REJECTED, Layout, Request, prepare
from rayclip.data.sources.base import Record, Source
from rayclip.data.verify import verify
from rayclip.store import Store
from rayclip.types import UserError

FIXED = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
SMALL = Layout(shard=6000, group=2000)


def examples(few: int, many: int):
    """Feed a test a few drawn examples, and many of them where the long grids are run."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@dataclass(frozen=True)
class Sample:
    """One record and what has to become of it, known without asking the package.

    `reason` is a pattern, None for a sample that is kept. `converted` is None where the file's own bytes are kept.
    """

    data: bytes = field(repr=False)
    converted: str | None = None
    pixels: np.ndarray | None = field(default=None, repr=False)
    reason: str | None = None
    label: int | None = 0
    error: Exception | None = None
    problem: str | None = None

    def read(self) -> bytes:
        if self.error is not None:
            raise self.error
        return self.data

    def record(self, path: str) -> Record:
        return Record(path=path, read=self.read, label=self.label, problem=self.problem)


class Listed(Source):
    """Samples of the test's own making."""

    class_names = tuple(NAMES)

    def __init__(self, **splits: list[Sample]) -> None:
        self._splits = splits

    def describe(self):
        return {"kind": "listed", "splits": {k: len(v) for k, v in self._splits.items()}}

    def splits(self):
        return {k: len(v) for k, v in self._splits.items()}

    def records(self, split, start=0):
        samples = self._splits[split]
        return (samples[i].record(path_of(i)) for i in range(start, len(samples)))


def path_of(i: int) -> str:
    return f"images/ü {i:03d}"


def prepared(folder: Path, **splits: list[Sample]) -> tuple[Store, Manifest]:
    request = Request(name="set", class_names=tuple(NAMES), splits=list(splits), layout=SMALL, jobs=2)
    return Store(str(folder)).child("set"), prepare(request, Listed(**splits), Store(str(folder)))


# Images of every kind, each with the pixels that it means


def encode(image: Image.Image, form: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


class Draw:
    """Random pixels of one random size."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.height, self.width = (int(n) for n in self.rng.integers(9, 24, 2))

    def pixels(self, *channels: int, top: int = 256, dtype: type = np.uint8) -> np.ndarray:
        return self.rng.integers(0, top, (self.height, self.width, *channels)).astype(dtype)

    def palette(self) -> tuple[Image.Image, np.ndarray]:
        index, colours = self.pixels(top=16), self.rng.integers(0, 256, (16, 3), dtype=np.uint8)
        image = Image.frombytes("P", (self.width, self.height), index.tobytes())
        image.putpalette(colours.tobytes())
        return image, colours[index]


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def lossy(form: str, mode: str = "RGB", **how: object) -> Callable[[Draw], Sample]:
    def make(d: Draw) -> Sample:
        data = encode(Image.fromarray(d.pixels(3)).convert(mode), form, **how)
        means = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        return Sample(data, "CMYK" if mode == "CMYK" else None, means)

    return make


def lossless(form: str, **how: object) -> Callable[[Draw], Sample]:
    def make(d: Draw) -> Sample:
        means = d.pixels(3)
        return Sample(encode(Image.fromarray(means), form, **how), None, means)

    return make


def frames(form: str, **how: object) -> Callable[[Draw], Sample]:
    def make(d: Draw) -> Sample:
        first, *others = (d.pixels(3) for _ in range(3))
        more = [Image.fromarray(o) for o in others]
        return Sample(encode(Image.fromarray(first), form, save_all=True, append_images=more, **how), "animated", first)

    return make


def sixteen(form: str, dtype: type = np.uint16) -> Callable[[Draw], Sample]:
    def make(d: Draw) -> Sample:
        values = d.pixels(top=65536, dtype=dtype)
        return Sample(encode(Image.fromarray(values), form), "16-bit", grey((values.astype(int) + 128) // 257))

    return make


def palette(form: str, alpha: bool = False, more: int = 0) -> Callable[[Draw], Sample]:
    def make(d: Draw) -> Sample:
        (image, means), others = d.palette(), [d.palette()[0] for _ in range(more)]
        how: dict[str, object] = {"transparency": bytes(range(0, 160, 10))} if alpha else {}
        how |= {"save_all": True, "append_images": others} if more else {}
        return Sample(encode(image, form, **how), "animated" if more else "palette", means)

    return make


def one_bit(d: Draw) -> Sample:
    values = d.pixels(top=2)
    return Sample(encode(Image.fromarray(values * 255).convert("1"), "PNG"), "1-bit", grey(values * 255))


def with_alpha(d: Draw) -> Sample:
    values = d.pixels(4)
    return Sample(encode(Image.fromarray(values), "PNG"), "RGBA", values[..., :3])


def grey_with_alpha(d: Draw) -> Sample:
    values = d.pixels(2)
    image = Image.frombytes("LA", (d.width, d.height), values.tobytes())
    return Sample(encode(image, "PNG"), "LA", grey(values[..., 0]))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def interlaced(d: Draw) -> Sample:
    """Adam7, which Pillow reads and does not write."""
    means = d.pixels(3)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = (means[y::dy, x::dx] for x, y, dx, dy in passes)
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", d.width, d.height, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Sample(b"\x89PNG\r\n\x1a\n" + body, None, means)


SINGLE: dict[str, Callable[[Draw], Sample]] = {
    "jpeg": lossy("JPEG"),
    "grey jpeg": lossy("JPEG", "L"),
    "progressive jpeg": lossy("JPEG", progressive=True),
    "cmyk jpeg": lossy("JPEG", "CMYK"),
    "webp": lossy("WEBP"),
    "png": lossless("PNG"),
    "lossless webp": lossless("WEBP", lossless=True),
    "bmp": lossless("BMP"),
    "tiff": lossless("TIFF"),
    "packed tiff": lossless("TIFF", compression="tiff_lzw"),
    "jpeg 2000": lossless("JPEG2000"),
    "ppm": lossless("PPM"),
    "palette png": palette("PNG"),
    "transparent palette png": palette("PNG", alpha=True),
    "gif": palette("GIF"),
    "16-bit png": sixteen("PNG"),
    "16-bit tiff": sixteen("TIFF"),
    "32-bit tiff of 16-bit values": sixteen("TIFF", np.int32),
    "1-bit png": one_bit,
    "interlaced png": interlaced,
    "rgba png": with_alpha,
    "grey png with alpha": grey_with_alpha,
}
ANIMATED: dict[str, Callable[[Draw], Sample]] = {
    "apng": frames("PNG"),
    "animated webp": frames("WEBP", lossless=True),
    "multi-page tiff": frames("TIFF"),
    "animated gif": palette("GIF", more=2),
}
GOOD = SINGLE | ANIMATED


# Damage


def destroyed(data: bytes, reason: str) -> Sample:
    return Sample(data, reason=reason)


def any_of(kinds: dict[str, Callable[[Draw], Sample]], d: Draw) -> Sample:
    return kinds[sorted(kinds)[int(d.rng.integers(len(kinds)))]](d)


def cut(d: Draw) -> Sample:
    data = any_of(SINGLE, d).data
    return destroyed(
        data[: max(1, int(len(data) * d.rng.uniform(0, 0.8)))], r"(truncated|damaged) \(.+\)|no image file"
    )


def cut_to_its_header(d: Draw) -> Sample:
    data = SINGLE["jpeg"](d).data
    return destroyed(data[: data.index(b"\xff\xda") + 14], r"truncated \(.+\)")


def headless(d: Draw) -> Sample:
    data = any_of(GOOD, d).data
    return destroyed(b"\xab" * 16 + data[16:], "no image file")


def broken_checksum(d: Draw) -> Sample:
    """A bit of the pixels, or of their checksum, is another one: without the checksum nobody would know."""
    data = bytearray(SINGLE["png"](d).data)
    begin = data.index(b"IDAT")
    length = struct.unpack(">I", data[begin - 4 : begin])[0]
    data[begin + 4 + int(d.rng.integers(length + 4))] ^= 1 << int(d.rng.integers(8))
    return destroyed(bytes(data), r"(truncated|damaged) \(.+\)")


def unknown_second_page(d: Draw) -> Sample:
    """Pillow raises a KeyError when it counts such pages."""
    data = bytearray(ANIMATED["multi-page tiff"](d).data)
    first = struct.unpack_from("<I", data, 4)[0]
    second = struct.unpack_from("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0])[0]
    tags = [second + 2 + 12 * i for i in range(struct.unpack_from("<H", data, second)[0])]
    (compression,) = [at for at in tags if struct.unpack_from("<H", data, at)[0] == 259]
    struct.pack_into("<H", data, compression + 8, 10825)
    return destroyed(bytes(data), r"damaged \(.+\)")


def bomb(d: Draw) -> Sample:
    header = struct.pack(">IIBBBBB", 30_000 + d.width, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return destroyed(b"\x89PNG\r\n\x1a\n" + body, r"damaged \(Image size .* could be decompression bomb.*\)")


def other_file(d: Draw) -> Sample:
    number = str(d.rng.integers(10**6)).encode()
    files = [
        b"<!DOCTYPE html><html><body><h1>404 Not Found</h1>" + number + b"</body></html>",
        b"https://example.org/" + number + b".jpg\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><path d="M' + number + b'"/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + number,
        b"%PDF-1.7\n" + number,
        b"PK\x03\x04" + number,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + number,
        bytes(100),
    ]
    return destroyed(files[int(d.rng.integers(len(files)))], "no image file")


def noise(d: Draw) -> Sample:
    return destroyed(b"\x00" + d.rng.bytes(int(d.rng.integers(1, 400))), "no image file")


def no_label(d: Draw) -> Sample:
    return Sample(any_of(GOOD, d).data, label=None, reason="no label")


def unreadable(d: Draw) -> Sample:
    data = any_of(GOOD, d).data
    errors = {
        r"cannot be read \(\[Errno 5\] Input/output error\)": OSError(5, "Input/output error"),
        r"cannot be read \(\[Errno 13\] Permission denied: 'x'\)": PermissionError(13, "Permission denied", "x"),
        r"cannot be read \(bad row\)": ValueError("bad row\nwith a second line"),
        r"cannot be read \(OSError\)": OSError(),
        r"cannot be read \(ValueError\)": ValueError(),
    }
    reason, error = list(errors.items())[int(d.rng.integers(len(errors)))]
    return Sample(data, error=error, reason=reason)


DAMAGED: dict[str, Callable[[Draw], Sample]] = {
    "cut": cut,
    "cut to its header": cut_to_its_header,
    "empty": lambda d: destroyed(b"", "empty file"),
    "headless": headless,
    "broken checksum": broken_checksum,
    "unknown second page": unknown_second_page,
    "bomb": bomb,
    "other file": other_file,
    "noise": noise,
    "float tiff": lambda d: destroyed(
        encode(Image.fromarray(d.pixels(dtype=np.float32)), "TIFF"), "floating-point pixels of unknown range"
    ),
    "32-bit tiff": lambda d: destroyed(
        encode(Image.fromarray(d.pixels(dtype=np.int32) - 300), "TIFF"), "32-bit pixels of unknown range"
    ),
    "no label": no_label,
    "unreadable": unreadable,
    "problem": lambda d: Sample(any_of(GOOD, d).data, problem="the list does not name it", reason="the list .* it"),
}


def sample(kind: str, seed: int) -> Sample:
    made = (GOOD | DAMAGED)[kind](Draw(seed))
    return made if made.reason is not None else Sample(made.data, made.converted, made.pixels, label=seed % 3)


def samples(kinds: dict[str, Callable[[Draw], Sample]], most: int) -> st.SearchStrategy[list[Sample]]:
    one = st.builds(sample, st.sampled_from(sorted(kinds)), st.integers(0, 2**32 - 1))
    return st.lists(one, min_size=most // 2, max_size=most)


@contextmanager
def prepared_anew(records: list[Sample]) -> Iterator[tuple[Store, Manifest]]:
    with TemporaryDirectory() as folder:
        yield prepared(Path(folder), test=records)


def check_outcome(store: Store, manifest: Manifest, records: list[Sample]) -> None:
    """Hold all that was written, is said and is read back against the records."""
    kept = [(i, r) for i, r in enumerate(records) if r.reason is None]
    aside = [(i, r) for i, r in enumerate(records) if r.reason is not None]
    split = manifest.splits["test"]
    assert (split.rows, split.rejected) == (len(kept), len(aside))
    assert split.per_class == tuple(sum(r.label == c for _, r in kept) for c in range(3))
    kinds = [r.converted for _, r in kept if r.converted]
    assert dict(split.converted) == {kind: kinds.count(kind) for kind in kinds}
    said = (
        f"{len(aside)} of the {len(records)} test images of 'set' were set aside when it was prepared "
        "(rejected.parquet says why)."
    )
    assert [n for n in manifest.notes_on("test") if "set aside" in n] == [said] * bool(aside)

    listed = pq.read_table(store.path(REJECTED)).to_pylist() if aside else []
    assert [(r["split"], r["path"], r["row"], r["label"]) for r in listed] == [
        ("test", path_of(i), i, r.label) for i, r in aside
    ]
    for found, (_, r) in zip(listed, aside, strict=True):
        assert re.fullmatch(r.reason, found["reason"])

    shards = [pq.read_table(store.path(s.file)) for s in split.shards]
    rows = [row for shard in shards for row in shard.to_pylist()]
    assert [(row["image"]["path"], row["label"]) for row in rows] == [(path_of(i), r.label) for i, r in kept]
    for row, (_, r) in zip(rows, kept, strict=True):
        assert (row["image"]["bytes"] == r.data) == (r.converted is None)

    data = open_data(str(store.path("")), "test")
    assert data.labels.tolist() == [r.label for _, r in kept]
    for (_, r), image in zip(kept, data.images(range(len(data))), strict=True):
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), r.pixels)
    assert data.notes == manifest.notes_on("test")
    assert verify(store) == (manifest, [])


@examples(8, 60)
def test_of_all_damaged_images_exactly_these_are_set_aside(count):
    fed = []

    @settings(max_examples=count, **FIXED)
    @given(good=samples(GOOD, 12), bad=samples(DAMAGED, 20), mix=st.randoms(use_true_random=False))
    def feed(good, bad, mix):
        records = [*good, *bad]
        mix.shuffle(records)
        with prepared_anew(records) as found:
            check_outcome(*found, records)
        fed.append(len(bad))

    feed()
    assert sum(fed) >= 8 * count


@pytest.mark.parametrize("kind", [*GOOD, *DAMAGED])
def test_every_kind_is_met(kind):
    """Whatever the drawn examples are: each kind, a few times, between two good ones."""
    records = [sample("png", 1), *(sample(kind, seed) for seed in range(8)), sample("jpeg", 2)]
    with prepared_anew(records) as found:
        check_outcome(*found, records)


@examples(6, 40)
def test_what_damage_inside_of_compressed_data_leaves_is_kept_and_readable_or_set_aside(count):
    """Whether a decoder notices is its own affair; what has been taken in must be readable ever after."""
    fed = []
    flips = st.lists(st.tuples(st.integers(1000, 1999), st.integers(1, 255)), min_size=1, max_size=4)
    one = st.tuples(st.sampled_from(sorted(GOOD)), st.integers(0, 2**32 - 1), flips)

    def damage(kind, seed, changes):
        data = bytearray(sample(kind, seed).data)
        for where, change in changes:  # not in the headers: those are rejected, or give sizes that take long
            data[len(data) * where // 2000] ^= change
        return Sample(bytes(data), label=seed % 3)

    @settings(max_examples=count, **FIXED)
    @given(drawn=st.lists(one, min_size=8, max_size=16))
    def feed(drawn):
        records = [sample("png", 0), *(damage(*d) for d in drawn)]
        with prepared_anew(records) as (store, manifest):
            split = manifest.splits["test"]
            assert split.rows + split.rejected == len(records)
            rejected = pq.read_table(store.path(REJECTED)).to_pylist() if split.rejected else []
            rows = [row for s in split.shards for row in pq.read_table(store.path(s.file)).to_pylist()]
            paths = [row["image"]["path"] for row in rows]
            assert sorted([*paths, *(r["path"] for r in rejected)]) == [path_of(i) for i in range(len(records))]
            assert paths == sorted(paths) and all(r["reason"] for r in rejected)
            data = open_data(str(store.path("")), "test")
            images = data.images(range(len(data)))
            assert len(images) == split.rows and all(i.mode == "RGB" and min(i.size) > 0 for i in images)
            assert verify(store)[1] == []
        fed.append(len(drawn))

    feed()
    assert sum(fed) >= 8 * count


def test_nothing_usable_is_an_error_that_names_the_first(tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 test images of 'set' can be used: images/ü 000: empty file\."):
        prepared(tmp_path, test=[destroyed(b"", ""), destroyed(b"x", "")])
    assert not (tmp_path / "set" / MANIFEST).exists()


# Manifests


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A prepared data set with two splits of several shards of like sizes, and rejections."""
    splits = {
        split: [Sample(png((i, 2 * i, split == "test")), label=i % 3) for i in range(8)] + [destroyed(b"", "")]
        for split in ("train", "test")
    }
    folder = tmp_path_factory.mktemp("whole")
    request = Request(name="set", class_names=tuple(NAMES), splits=list(splits), layout=Layout(shard=300, group=150))
    prepare(request, Listed(**splits), Store(str(folder)))
    return folder / "set"


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "set")


def attempt(read: Callable[[], object]) -> object:
    """What is read, or None after an error in one sentence."""
    try:
        return read()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


@pytest.mark.parametrize(
    "to", ["../outside", "{}/outside", "./../outside", "inside/../../outside", "..", ".", "inside"]
)
@pytest.mark.parametrize("what", ["index", "shard"])
def test_a_manifest_never_reaches_out_of_its_folder(folder, to, what):
    """What it points to is there, with the right size and checksum."""
    outside, inside = folder.parent / "outside", folder / "inside"
    shutil.copytree(folder, outside)
    shutil.copytree(outside, inside)
    raw = json.loads((folder / MANIFEST).read_text())
    split = raw["splits"]["test"]
    entry = split["index"] if what == "index" else split["shards"][0]
    entry["file"] = f"{to.format(folder.parent)}/{entry['file']}"
    (folder / MANIFEST).write_text(json.dumps(seal(raw)))
    for read in (lambda: open_data(str(folder), "test"), lambda: verify(Store(str(folder)))):
        with pytest.raises(UserError, match=r"is no manifest .*should match"):
            read()


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden", "", "a\0b", "a\\b"])
@pytest.mark.parametrize("what", ["data set", "split"])
def test_a_manifest_gives_no_name_that_reaches_out_of_a_folder(folder, name, what):
    """Pictures and cells are called after the data set, indices after the split."""
    raw = json.loads((folder / MANIFEST).read_text())
    if what == "split":
        raw["splits"][name] = raw["splits"].pop("test")
    else:
        raw["name"] = name
    with pytest.raises(UserError, match=r"is no manifest .*should match"):
        Manifest.from_json(json.dumps(seal(raw)), "here")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(recipe=raw["recipe"] + 1), "layout version"),
        (lambda raw: raw.update(class_names=raw["class_names"][::-1]), "changed after it was written"),
        (lambda raw: raw["splits"]["test"]["shards"].reverse(), "changed after it was written"),
        (lambda raw: raw["splits"].update(test=raw["splits"]["train"]), "changed after it was written"),
        (lambda raw: raw["splits"]["test"]["shards"].pop(), "splits.test: the rows do not add up"),
        (lambda raw: raw["splits"]["test"].update(rows=7), "splits.test: the rows do not add up"),
        (lambda raw: raw["splits"]["test"]["index"].update(sha256="0" * 64), "changed after it was written"),
        (lambda raw: raw.pop("notes"), "notes: missing"),
        (lambda raw: raw.pop("sha256"), "changed after it was written"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_manifest(folder, change, says):
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"is no manifest .*{says}.*: prepare it again with --force") as caught:
        open_data(str(folder), "test")
    assert str(folder / MANIFEST) in str(caught.value) and "\n" not in str(caught.value)


# Files of a prepared data set


SHARD = "test-00001.parquet"


def flip(path: Path, at: int, change: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= change
    path.write_bytes(data)


def permuted(folder: Path) -> None:
    path = folder / "index-test.npy"
    np.save(path, np.load(path)[[1, 0, 2, 3, 4, 5, 6, 7]])


def emptied(folder: Path) -> None:
    table = pq.read_table(folder / REJECTED)
    pq.write_table(table.slice(0, 1), folder / REJECTED)


@pytest.mark.parametrize(
    ("damage", "problems", "readable"),
    [
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), [f"{SHARD} has .* bytes; the .*"], False),
        (lambda f: (f / SHARD).write_bytes(b""), [f"{SHARD} has 0 bytes; the manifest says .*"], False),
        (lambda f: flip(f / SHARD, 150), [f"{SHARD} has other content than the manifest says."], False),
        (lambda f: (f / SHARD).unlink(), [f"{SHARD} is missing."], False),
        (permuted, ["index-test.npy has other content than the manifest says."], False),
        (lambda f: (f / "index-test.npy").unlink(), ["index-test.npy is missing."], False),
        (
            lambda f: shutil.copy(f / SHARD, f / "test-00077.parquet"),
            ["test-00077.parquet is not in the manifest, but other programs would read it."],
            True,
        ),
        (lambda f: (f / REJECTED).unlink(), [f"{REJECTED} lists 0 images; the manifest says 2."], True),
        (emptied, [f"{REJECTED} lists 1 images; the manifest says 2."], True),
        (lambda f: (f / REJECTED).write_bytes(b"x"), [f"{REJECTED} is damaged."], True),
        (lambda f: pq.write_table(pa.table({"x": [1]}), f / REJECTED), [f"{REJECTED} is damaged."], True),
        (
            lambda f: [(f / "train-00000.parquet").unlink(), flip(f / SHARD, 9)],
            ["train-00000.parquet is missing.", f"{SHARD} has other content than the manifest says."],
            False,
        ),
        (lambda f: None, [], True),
    ],
)
def test_each_damage_on_disk_is_reported_and_nothing_else(folder, whole, damage, problems, readable):
    damage(folder)
    found = verify(Store(str(folder)))[1]
    assert len(found) == len(problems) and all(map(re.fullmatch, problems, found))
    assert attempt(lambda: snapshot(folder)) == (snapshot(whole) if readable else None)


def test_files_of_one_folder_are_read_once_and_only_together_where_they_belong_together(tmp_path):
    write(tmp_path / "validation-0.parquet", [0, 1])
    write(tmp_path / "val-1.parquet", [2])
    assert open_data(str(tmp_path), "test").labels.tolist() == [2, 0, 1]  # "validation" begins with "val"
    with pytest.raises(UserError, match=r"holds no other images, only val: name one of those\."):
        open_data(str(tmp_path), "other")
    write(tmp_path / "val-2.parquet", [1], names=["dog", "cat", "lemon"])
    with pytest.raises(UserError, match=r"val-2.parquet names other classes or columns than .*val-1.parquet"):
        open_data(str(tmp_path), "test")
    write(tmp_path / "val-2.parquet", [1], column="img")
    with pytest.raises(UserError, match=r"val-2.parquet names other classes or columns than .*val-1.parquet"):
        open_data(str(tmp_path), "test")


# An evaluation


def bad_parquet(path: Path) -> str:
    """Nine rows of which five can be used: an empty image, a cut one, a foreign one, a wrong label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [png((20 * i, 7, 7)) for i in range(9)]
    images[2], images[4], images[7] = b"", images[4][:50], b"<html>"
    return write(path, [0, 1, 2, 0, 1, -1 if "label" in path.name else 2, 0, 1, 2], images)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "root"))
    return tmp_path


@pytest.fixture
def rayclip(monkeypatch, capsys):
    """The command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "500")  # no path is folded, however long the temporary folder's is

    def run(*args: object) -> tuple[int, str, str]:
        code, out, err = call(monkeypatch, capsys, *args, *["--quiet"] * (args[:2] == ("data", "prepare")))
        return code or 0, out, err

    return run


def advised(err: str) -> list[str]:
    """The arguments of the command that an error message advises."""
    program, *args = shlex.split(re.search(r"set (?:them|the others) aside with `(.+)`\.$", err.strip()).group(1))
    assert program == "rayclip"
    return args


FILES = ["bad.parquet", "my bad set (v2).parquet", "bad label.parquet", "digits.parquet", "shards/test-0.parquet"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_with_bad_images_is_refused_and_the_advice_works(here, saved_clip, rayclip, capsys, file):
    place = path = bad_parquet(here / file)
    rows, bad = 9, 3 + ("label" in file)
    if "/" in file:  # a folder of two files
        place = str(here / "shards")
        write(here / "shards/test-1.parquet", [1, 2])
        rows += 2
    refused = rayclip("eval", "--model", saved_clip, "--data", place, "--out", "out", "--eps", "1/255", "--no-tracking")
    assert refused[0] == 2 and refused[1] == "" and refused[2].count("\n") == 1
    if "label" in file:
        assert f"{path} has 1 images without a label" in refused[2]
    else:
        assert f"3 of the {rows} images" in refused[2] and "(row 2: empty file)" in refused[2]
    assert list(Path.cwd().iterdir()) == [], "nothing is written"
    args = advised(refused[2])
    code, out, err = rayclip(*args)
    assert (code, err) == (0, "") and f"{rows - bad} images" in out and f"set aside: {bad} (rejected.parquet)" in out
    data = Opened(quiet=True).data(args[2], "test", "native", "curated")
    assert len(data) == rows - bad
    assert capsys.readouterr().err == (
        f"note: {args[2]}: {bad} of the {rows} test images of '{args[2]}' were set aside when it was prepared "
        "(rejected.parquet says why).\n"
    )


def test_an_evaluation_counts_the_images_that_are_left(here, saved_clip, rayclip):
    command = ["eval", "--model", saved_clip, "--out", "out", "--eps", "1/255", "--no-tracking", "--json", "rows.json"]
    command += ["--local", "--steps", "1"]
    code, _, err = rayclip(*command, "--data", bad_parquet(here / "bad.parquet"))
    assert code == 2 and err.startswith("error: 3 of the 9 images of 'bad' cannot be read (row 2: empty file)")
    assert rayclip(*advised(err))[0] == 0
    code, _, err = rayclip(*command, "--data", "bad")
    assert code == 0 and "note: bad: 3 of the 9 test images of 'bad' were set aside when it was prepared" in err
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == 2 and {row["n"] for row in rows} == {6}


# Whole commands


def test_strict_stops_at_the_first_bad_image_and_prepares_nothing(here, rayclip):
    path = bad_parquet(here / "bad.parquet")
    prepare_it = ["data", "prepare", "mine", "--source", "parquet", path]
    code, out, err = rayclip(*prepare_it, "--strict")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "bad.parquet#2 of 'mine' test cannot be used: the row has no image" in err and "without --strict" in err
    assert not list((here / "root").rglob(MANIFEST)) and not list((here / "root").rglob("*.parquet"))
    code, out, err = rayclip("data", "verify", "mine")
    assert code == 2 and "holds no prepared data set" in err
    code, out, _ = rayclip(*prepare_it)
    assert code == 0 and "6 images; set aside: 3 (rejected.parquet)" in out
    code, out, _ = rayclip("data", "verify", "mine")
    assert code == 0 and "mine: as its manifest says" in out
    assert (
        rayclip("data", "prepare", "all", "--source", "parquet", write(here / "good.parquet", [0, 1]), "--strict")[0]
        == 0
    )


def test_odd_class_folders_are_noted_when_they_are_prepared_and_read(here, rayclip, capsys):
    images = here / "images"
    for path in ("tabby_cat/1.png", "Tabby cat/2.png", "zebra/3.png"):
        forms.put(images / "test" / path, png("red"))
    forms.put(images / "test/zebra/4.png", b"")
    forms.put(images / "test/zebra/5.jpg", "no image")
    (images / "test/yak").mkdir()
    code, out, err = rayclip("data", "prepare", "animals", "--source", "folder", images)
    assert (code, err) == (0, "")
    assert "3 images; set aside: 2 (rejected.parquet)" in out
    assert "  note: Class folders 'Tabby cat' and 'tabby_cat' spell one name and are one class.\n" in out
    assert "  note: 1 class folder without images: yak.\n" in out
    data = Opened(quiet=True).data("animals", "test", "native", "curated")
    assert data.class_names == ("Tabby cat", "yak", "zebra") and data.labels.tolist() == [0, 0, 2]
    said = capsys.readouterr().err
    assert "2 of the 5 test images of 'animals' were set aside" in said and "spell one name" in said and "yak" in said
    rejected = pq.read_table(here / "root/animals" / REJECTED).to_pylist()
    assert [(r["path"], r["label"], r["reason"]) for r in rejected] == [
        ("test/zebra/4.png", 2, "empty file"),
        ("test/zebra/5.jpg", 2, "no image file"),
    ]

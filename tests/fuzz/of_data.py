"""Prepared data sets, captions, annotations, WebDatasets, and users' own tables of images."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.hub_forms import make_wds
from fuzz import mutations as m
from fuzz.kind import NAMES, SMALL, Form, Kind, always, as_text, png, snapshot, unforged
from fuzz.tars import tar
from rayclip.data import open_data
from rayclip.data.captions import read_captions, read_table
from rayclip.data.descriptions import match_classes, read_descriptions
from rayclip.data.labels import read_class_names
from rayclip.data.manifest import MANIFEST
from rayclip.data.opening import open_pairs
from rayclip.data.prepare import Request, prepare
from rayclip.data.sources.annotations import CaptionFolder
from rayclip.data.sources.base import Entry, FileSource, Source
from rayclip.data.sources.parquet_files import ParquetSource
from rayclip.data.sources.webdataset import open_webdataset
from rayclip.data.verify import verify
from rayclip.store import Store

# Prepared data sets


def pictures(folder: Path, stop: bool = False) -> Source:
    """Nine pictures in two splits, one of them empty; `stop` stops the preparation at the second split."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "8.png").write_bytes(b"")
    entries = {s: [Entry(f"{i}.png", i % 3) for i in range(9)] for s in ("train", "test")}

    class Stopping(FileSource):
        def records(self, split: str, start: int = 0) -> Any:
            if stop and split == "test":
                raise OSError("the network is gone")
            return super().records(split, start)

    return Stopping(folder, entries, {"kind": "folder"}, NAMES)


def prepare_pictures(folder: Path, **how: Any) -> None:
    request = Request(name="set", class_names=NAMES, splits=["train", "test"], layout=SMALL, jobs=1)
    prepare(request, pictures(folder / "source", **how), Store(str(folder)))


def seal(raw: Any) -> Any:
    """The manifest with the checksum that belongs to it, so that only what it says can betray it."""
    if not isinstance(raw, dict):
        return raw
    rest = {k: v for k, v in raw.items() if k != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def manifest_json(sound: bytes) -> m.Strategy:
    return m.json_file(sound, seal)


def read_prepared(folder: Path) -> Any:
    found = snapshot(folder / "set")
    manifest, problems = verify(Store(str(folder / "set")))
    as_text([manifest.model_dump(mode="json"), problems])
    return found


def verified(folder: Path) -> Any:
    _, problems = verify(Store(str(folder / "set")))
    as_text(problems)
    return read_prepared(folder)


MANIFESTS = Kind(
    make=prepare_pictures,
    forms=(
        *[Form(file=f"set/{MANIFEST}", damage=manifest_json, read=read_prepared, same=unforged)] * 4,
        Form(file="set/test-00001.parquet", damage=m.parquet, read=verified, same=always),
        Form(file="set/index-test.npy", damage=m.any_file, read=verified, same=always),
        Form(file="set/rejected.parquet", damage=m.parquet, read=verified, same=always),
    ),
)


# Captions


def make_captions(folder: Path) -> None:
    rows = [(i, name, r, f"a {name}, {r}", 0.3 - r / 10, "description") for i, name in enumerate(NAMES) for r in (1, 2)]
    columns = ["class_index", "class_name", "rank", "caption", "score", "source"]
    lines = [",".join(columns), *(",".join(f'"{v}"' if i == 3 else str(v) for i, v in enumerate(r)) for r in rows)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n", "utf-8-sig")
    origin = json.dumps({"class_names": list(NAMES), "filter": "none"})
    (folder / "table.csv.json").write_text(origin)
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(table.replace_schema_metadata({"rayclip_captions": origin}), folder / "table.parquet")
    (folder / "cupl.json").write_text(json.dumps({name: [f"a {name}", f"one {name}"] for name in NAMES}))
    (folder / "names.txt").write_text("0 cat\n1 dog\n2 lemon\n")
    (folder / "names.json").write_text(json.dumps({"0": "cat", "1": "dog", "2": "lemon"}))


def read_caption_table(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        as_text([row.model_dump() for row in read_table(folder / name).rows])
        for names in (None, NAMES):
            captions = read_captions(folder / name, names)
            as_text(captions)
            assert len(captions) <= 1000 and all(text.strip() for own in captions for text in own)

    return read


def read_cupl(folder: Path) -> Any:
    found = read_descriptions(str(folder / "cupl.json"))
    matched = match_classes(found.sentences, NAMES, ("kitten", "puppy", "citrus"))
    as_text([matched.captions, [u.nearest for u in matched.unused], dict(found.sentences)])


def read_names(name: str) -> Callable[[Path], Any]:
    return lambda folder: as_text(read_class_names(folder / name))


CAPTIONS = Kind(
    make=make_captions,
    forms=(
        *[Form(file="table.csv", damage=m.text, read=read_caption_table("table.csv"))] * 2,
        Form(file="table.csv.json", damage=m.json_file, read=read_caption_table("table.csv")),
        *[Form(file="table.parquet", damage=m.parquet, read=read_caption_table("table.parquet"))] * 2,
        Form(file="cupl.json", damage=m.json_file, read=read_cupl),
        Form(file="names.txt", damage=m.text, read=read_names("names.txt")),
        Form(file="names.json", damage=m.json_file, read=read_names("names.json")),
    ),
)


# Annotations


def make_annotations(folder: Path) -> None:
    for form in ("karpathy", "coco", "token"):
        (folder / form / "images").mkdir(parents=True)
        for number in range(4):
            (folder / form / "images" / f"{number}.png").write_bytes(png(number))
    images = [
        {"filename": f"{i}.png", "filepath": "images", "split": s, "sentences": [{"raw": f"picture {i}"}, {"raw": "x"}]}
        for i, s in enumerate(("train", "restval", "val", "test"))
    ]
    (folder / "karpathy/dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
        "annotations": [{"image_id": i // 2, "id": i, "caption": f"picture {i}"} for i in range(8)],
    }
    (folder / "coco/captions_val2017.json").write_text(json.dumps(coco))
    lines = [f"{i}.png#{n}\ta picture, {i}\n" for i in range(4) for n in range(2)]
    (folder / "token/Flickr8k.token.txt").write_text("".join(lines))
    (folder / "token/Flickr_8k.testImages.txt").write_text("0.png\n2.png\n")


def read_records(source: Source, out: Path) -> Any:
    """Prepare every split, as a user would, and read what was prepared."""
    as_text([source.describe(), source.notes])
    name = "set"
    names = tuple(source.class_names)
    request = Request(name=name, class_names=names, splits=list(source.splits()), layout=SMALL, jobs=1)
    manifest = prepare(request, source, Store(str(out)))
    for split in manifest.splits:
        data = open_data(str(out / name), split) if names else open_pairs(str(out / name), split)
        assert all(image.mode == "RGB" for image in data.images(range(len(data))))
        as_text(data.captions if not names else list(data.class_names))  # type: ignore[union-attr]
    assert verify(Store(str(out / name)))[1] == []


def read_annotations(form: str, name: str) -> Callable[[Path], Any]:
    return lambda folder: read_records(CaptionFolder(folder / form, name), folder / "out")


ANNOTATIONS = Kind(
    make=make_annotations,
    forms=tuple(
        Form(file=f"{form}/{file}", damage=damage, read=read_annotations(form, name), writes=True)
        for form, file, damage, name in (
            ("karpathy", "dataset_flickr8k.json", m.json_file, "flickr8k"),
            ("coco", "captions_val2017.json", m.json_file, "mscoco_captions"),
            ("token", "Flickr8k.token.txt", m.text, "flickr8k"),
            ("token", "Flickr_8k.testImages.txt", m.text, "flickr8k"),
        )
    ),
)


# WebDatasets


def make_archives(folder: Path) -> None:
    make_wds(folder / "labels", {"test": 3})
    make_wds(folder / "captions", {"test": 3}, captions=True)


def read_archive(form: str) -> Callable[[Path], Any]:
    return lambda folder: read_records(open_webdataset(folder / form), folder / "out")


ARCHIVES = Kind(
    make=make_archives,
    forms=(
        *[Form(file="labels/test/0.tar", damage=tar, read=read_archive("labels"), writes=True)] * 3,
        *[Form(file="captions/test/0.tar", damage=tar, read=read_archive("captions"), writes=True)] * 2,
        Form(file="labels/test/nshards.txt", damage=m.text, read=read_archive("labels"), writes=True),
        Form(file="labels/classnames.txt", damage=m.text, read=read_archive("labels"), writes=True),
    ),
)


# Users' own tables of images


def make_tables(folder: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "label": i % 3, "captions": [f"a {i}"]} for i in range(9)]
    schema = pa.schema([("image", image), ("label", pa.int64()), ("captions", pa.list_(pa.string()))])
    whole = pa.Table.from_pylist(rows, schema)
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    own = whole.select(["image", "label"])
    own = own.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(own, folder / "own.parquet", row_group_size=4)
    pq.write_table(whole.select(["image", "captions"]), folder / "pairs.parquet", row_group_size=4)
    (folder / "arrow").mkdir()
    with pa.OSFile(str(folder / "arrow/test.arrow"), "wb") as sink, pa.ipc.new_stream(sink, own.schema) as stream:
        stream.write_table(own, 4)


def read_own(file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        data = open_data(str(folder / file), "test")
        data.check(again=True)
        images = data.images(range(len(data)))
        assert len(images) == len(data.labels) and max(data.labels) < len(data.class_names)
        as_text([data.class_names, data.notes])
        read_records(ParquetSource({"test": [folder / file]}, "set"), folder / "out")

    return read


def read_pairs(folder: Path) -> Any:
    data = open_pairs(str(folder / "pairs.parquet"))
    data.check(again=True)
    assert len(data.images(range(len(data)))) == len(data.captions)
    as_text(data.captions)
    read_records(ParquetSource({"test": [folder / "pairs.parquet"]}, "set", captions=True), folder / "out")


TABLES = Kind(
    make=make_tables,
    forms=(
        *[Form(file="own.parquet", damage=m.parquet, read=read_own("own.parquet"), writes=True)] * 2,
        Form(file="pairs.parquet", damage=m.parquet, read=read_pairs, writes=True),
        Form(file="arrow/test.arrow", damage=m.any_file, read=read_own("arrow/test.arrow"), writes=True),
    ),
)

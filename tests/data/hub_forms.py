"""Miniature data sets in the forms that are found on the hub, for a folder or for `hub_server`."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# CLIP_benchmark's repositories `clip-benchmark/wds_NAME`, all in one form.
WDS_CLASSES = {
    "imagenet1k": 5,
    "sun397": 4,
    "cars": 4,
    "fgvc_aircraft": 3,
    "stl10": 3,
    "country211": 4,
    "vtab-caltech101": 4,
    "vtab-cifar10": 3,
    "vtab-cifar100": 5,
    "vtab-dtd": 3,
    "vtab-eurosat": 3,
    "vtab-flowers": 4,
    "vtab-pets": 3,
    "vtab-pcam": 2,
}
WDS_CAPTIONS = ("mscoco_captions", "flickr30k", "flickr8k")


class Sample(NamedTuple):
    """What was written, to be compared with what is read: `target` is a label or a list of captions."""

    image: bytes
    target: Any


def picture(number: int, form: str = "png", size: int = 8) -> bytes:
    """An encoded image whose colour tells its number."""
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "webp" else {}
    Image.new("RGB", (size, size), (number % 256, number // 256 % 256, 7)).save(
        buffer, "jpeg" if form == "jpg" else form, **options
    )
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar of these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_wds(
    folder: Path,
    splits: Mapping[str, int],
    class_names: Sequence[str] = ("cat", "dog", "lemon"),
    captions: bool = False,
    per_tar: int = 3,
    form: str = "webp",
) -> dict[str, list[Sample]]:
    """A data set in CLIP_benchmark's WebDataset form.

    Args:
        folder: created; becomes the repository's root.
        splits: number of samples of each, such as {"train": 7, "test": 4}; labels go round the classes.
        class_names: written to `classnames.txt`, unless `captions`.
        captions: two captions for each image instead of a label.
        per_tar: samples in each tar.
        form: image files' ending, `webp`, `png`, `jpg` or `jpeg`.

    Returns:
        the samples of each split in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if captions:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in class_names))
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    written: dict[str, list[Sample]] = {}
    number = 0
    for split, count in splits.items():
        samples = written[split] = []
        members: list[list[tuple[str, bytes]]] = []
        for i in range(count):
            image = picture(number, form)
            target: Any = [f"a {number}.", f"number {number}"] if captions else i % len(class_names)
            text = "\n".join(target) if captions else str(target)
            # webdataset's writer sorts a sample's members by their endings
            of_sample = sorted([(form, image), ("txt" if captions else "cls", text.encode())])
            members.append([(f"s{i:07d}.{ending}", data) for ending, data in of_sample])
            samples.append(Sample(image, target))
            number += 1
        tars = [members[i : i + per_tar] for i in range(0, count, per_tar)]
        for i, tar in enumerate(tars):
            write_tar(folder / split / f"{i}.tar", [m for of_sample in tar for m in of_sample])
        (folder / split).mkdir(exist_ok=True)
        (folder / split / "nshards.txt").write_text(f"{len(tars)}\n")
    return written


def write_parquet(
    path: Path,
    columns: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    label: str = "label",
    row_group: int = 2,
) -> Path:
    """A Parquet file of these columns; `class_names` are written for `label` as the datasets library does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns))
    if class_names is not None:
        features = {label: {"names": list(class_names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group)
    return path


def image_structs(images: Sequence[bytes | None]) -> pa.Array:
    """The datasets library's Image column; None has null bytes."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], kind)


def make_parquet(
    folder: Path,
    splits: Mapping[str, int],
    class_names: Sequence[str] | None = ("cat", "dog", "lemon"),
    image: str = "image",
    label: str = "label",
    captions: bool = False,
    layout: str = "data/{split}-{i:05d}-of-{n:05d}.parquet",
    per_file: int = 5,
    row_group: int = 2,
) -> dict[str, list[Sample]]:
    """A data set in Parquet files in the Hugging Face layout.

    Args:
        folder: created; becomes the repository's root.
        splits: number of rows of each; labels go round the classes.
        class_names: written into the schema's metadata; None for labels 0, 1 and 2 that are named nowhere.
        image, label: the columns' names.
        captions: `label` holds a list of two captions instead.
        layout: a file's path, of its split's name, its number `i` and the number of files `n`.
        per_file, row_group: rows in each file, and in each of its row groups.

    Returns:
        the samples of each split in order.
    """
    written: dict[str, list[Sample]] = {}
    number = 0
    for split, count in splits.items():
        samples = written[split] = []
        for i in range(count):
            target: Any = [f"a {number}.", f"number {number}"] if captions else i % len(class_names or "abc")
            samples.append(Sample(picture(number), target))
            number += 1
        parts = [samples[i : i + per_file] for i in range(0, count, per_file)]
        for i, part in enumerate(parts):
            columns = {
                image: image_structs([s.image for s in part]),
                label: pa.array([s.target for s in part], pa.list_(pa.string()) if captions else pa.int64()),
            }
            names = None if captions else class_names
            write_parquet(folder / layout.format(split=split, i=i, n=len(parts)), columns, names, label, row_group)
    return written

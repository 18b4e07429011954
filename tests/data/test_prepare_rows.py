"""Every row from every source it has, by the command that a user types, from miniatures of the published forms.

What is written is read with pyarrow alone; then `open_data` and `open_pairs` have to give the same.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.datasets
from PIL import Image

from calling import call
from data import forms, hub_forms
from data.test_annotations import coco, dump, karpathy
from rayclip.data import open_data, open_pairs
from rayclip.data.registry import DATASETS
from rayclip.types import UserError

NAMES = json.loads((Path(__file__).parents[2] / "rayclip" / "data" / "classnames.json").read_text(encoding="utf-8"))
Wanted = dict[str, list[tuple[object, bytes]]]


@dataclass
class Made:
    """A miniature: what to type after the name, and what has to come of it.

    Attributes:
        raw, meant: the source's spelling and ours, in the source's label order.
        wanted: for each split (label or captions, image) in order.
        arrays: of the images only the pixels are known.
    """

    source: list[str]
    raw: tuple[str, ...]
    meant: tuple[str, ...]
    wanted: Wanted
    arrays: bool = False
    note: str = ""


# What the published files call the classes, in the published label order, and how CLIP is asked for them.

_OWN_NAMES = {
    "caltech256": (forms.CALTECH256, lambda n: n[4:].removesuffix("-101").replace("-", " ")),
    "fgvc_aircraft": (forms.AIRCRAFT, str),
    "stanford_cars": (forms.CARS, str),
    "sun397": (forms.SUN, lambda n: n.replace("_", " ").replace("/", " ")),
}


def published(name: str) -> list[tuple[str, str]]:
    """(published, curated) spelling of each class."""
    if name in _OWN_NAMES:
        raw, meant = _OWN_NAMES[name]
        return [(n, meant(n)) for n in raw]
    names = NAMES[DATASETS[name].curated or name]
    return list(names.items()) if isinstance(names, dict) else [(n.replace(" ", "_"), n) for n in names]


def _columns(pairs: list[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    raw, meant = zip(*pairs, strict=True)
    return raw, meant


# Miniatures


def torchvision_folder(name, folder, monkeypatch, hub) -> Made:
    wanted = forms.make(name, folder, monkeypatch)
    raw, meant = _columns(published(name))
    if name == "imagenet":
        raw = tuple(f"word {wnid}, synonym" for wnid in forms.imagenet_wnids())
    elif name in ("stl10", "oxford_pets"):  # with blanks
        raw = meant
    elif name == "flowers102":
        raw = tuple(getattr(torchvision.datasets.Flowers102, "classes", map(str, range(1, 103))))
    elif name == "pcam":
        raw = ("no tumor tissue", "tumor tissue")
    return Made(["torchvision", str(folder)], raw, meant, wanted, name in forms.ARRAYS)


def torchvision_download(name, folder, monkeypatch, hub) -> Made:
    """Without a path: what lies among the downloads is taken as it is."""
    monkeypatch.setenv("RAYCLIP_DOWNLOADS", str(folder))
    made = torchvision_folder(name, folder, monkeypatch, hub)
    made.source = ["torchvision"]
    return made


def class_folders(name, folder, monkeypatch, hub) -> Made:
    """ImageFolder, its classes written in an order of their own."""
    pairs = sorted((raw.replace("/", " "), meant) for raw, meant in published(name))
    wanted: Wanted = {}
    for split in ("train", DATASETS[name].evaluated):
        of_class = {}
        for i, (raw, _) in reversed(list(enumerate(pairs))):
            paths = [folder / split / raw / f"{i}_{n}.jpg" for n in range(1 + (i == 2))]
            of_class[i] = [(i, forms.put(path, forms.jpeg())) for path in paths]
        wanted[split] = [record for i in sorted(of_class) for record in of_class[i]]
    return Made(["folder", str(folder)], *_columns(pairs), wanted)


def imagenet_folder(name, folder, monkeypatch, hub) -> Made:
    wanted = forms.make("imagenet_folder", folder, monkeypatch)
    return Made(["folder", str(folder)], tuple(forms.imagenet_wnids()), tuple(NAMES["imagenet"]), wanted)


def imagenet_kaggle(name, folder, monkeypatch, hub) -> Made:
    wanted = forms.make("imagenet_kaggle", folder, monkeypatch)
    raw = tuple(f"word {wnid}, synonym" for wnid in forms.imagenet_wnids())
    return Made(["folder", str(folder)], raw, tuple(NAMES["imagenet"]), wanted)


def tiny_folder(name, folder, monkeypatch, hub) -> Made:
    wanted = forms.make("tiny_imagenet_folder", folder, monkeypatch)
    raw = tuple(f"word {wnid}, synonym" for wnid in NAMES["tiny_imagenet"])
    return Made(["folder", str(folder)], raw, tuple(NAMES["tiny_imagenet"].values()), wanted)


def coop_folder(name, folder, monkeypatch, hub) -> Made:
    """CoOp's list beside the folder of images; its class names have underscores."""
    raw = tuple(f"some_class_{i}" for i in range(DATASETS[name].classes))
    wanted: Wanted = {}
    rows = {}
    for split, labels in (("train", (0, 3)), ("val", (1,)), ("test", range(len(raw)))):
        files = [f"{raw[i]}/{split}.jpg" for i in labels]
        images = [forms.put(folder / "images" / file, forms.jpeg()) for file in files]
        wanted[split] = list(zip(labels, images, strict=True))
        rows[split] = [[file, i, raw[i]] for file, i in zip(files, labels, strict=True)]
    dump(folder / "split_zhou_Any.json", rows)
    return Made(["folder", str(folder)], raw, tuple(name.replace("_", " ") for name in raw), wanted)


def own_parquet(name, folder, monkeypatch, hub) -> Made:
    """Files in the Hugging Face layout, whose labels count the published classes backwards."""
    row = DATASETS[name]
    if row.classes == 0:
        wanted = hub_forms.make_parquet(
            folder, {"train": 7, "test": 5}, label="captions", captions=True, layout="{split}-{i}.parquet"
        )
        return Made(["parquet", str(folder)], (), (), _swapped(wanted))
    raw, meant = _columns(published(name)[::-1])
    sizes = {"train": 7, row.evaluated: min(row.classes, 60) + 3}
    wanted = hub_forms.make_parquet(folder, sizes, raw, layout="{split}-{i:05d}-of-{n:05d}.parquet", per_file=20)
    return Made(["parquet", str(folder)], raw, meant, _swapped(wanted))


def hub_parquet(name, folder, monkeypatch, hub) -> Made:
    """The row's repository, in the split names that it has there; its labels are in the order of the names."""
    row = DATASETS[name]
    pairs = sorted(published(name))
    theirs = {theirs: ours for ours, theirs in row.hub.splits.items()}
    wanted = hub_forms.make_parquet(
        hub.root / row.hub.repo, dict.fromkeys(theirs, 110), [raw for raw, _ in pairs], per_file=60
    )
    return Made(["hub"], *_columns(pairs), {theirs[s]: w for s, w in _swapped(wanted).items()})


def _webdataset(folder, row, splits, pairs) -> Made:
    if row.classes == 0:
        wanted = hub_forms.make_wds(folder, dict.fromkeys(splits, 7), captions=True)
        return Made([], (), (), _swapped(wanted))
    form = "jpg" if row.name == "imagenet" else "webp"
    count = min(len(pairs), 110) + 3
    wanted = hub_forms.make_wds(folder, dict.fromkeys(splits, count), [raw for raw, _ in pairs], per_tar=50, form=form)
    return Made([], *_columns(pairs), _swapped(wanted))


def hub_webdataset(name, folder, monkeypatch, hub) -> Made:
    """CLIP_benchmark's repository. Its labels are the published ones, whatever it calls the classes."""
    row = DATASETS[name]
    splits = row.hub.splits.values()
    if name == "caltech101":  # VTAB's classes and their order
        pairs = [(n.replace(" ", "_"), n) for n in NAMES["caltech101_vtab"]]
    elif row.classes == 0 or row.curated is None:
        pairs = published(name) if row.classes else []
    else:
        pairs = [(f"its {i}. name", meant) for i, (_, meant) in enumerate(published(name))]
    made = _webdataset(hub.root / row.hub.repo, row, splits, pairs)
    ours = {theirs: ours for ours, theirs in row.hub.splits.items()}
    made.source, made.wanted = ["hub"], {ours[s]: w for s, w in made.wanted.items()}
    made.note = row.hub.note
    return made


def local_webdataset(name, folder, monkeypatch, hub) -> Made:
    """The same form in a folder, whose labels may be in any order: here the names' own, backwards."""
    row = DATASETS[name]
    pairs = published(name)[::-1] if row.classes else []
    made = _webdataset(folder, row, ("train", row.evaluated), pairs)
    made.source = ["webdataset", str(folder)]
    return made


def _swapped(samples) -> Wanted:
    return {split: [(sample.target, sample.image) for sample in of_split] for split, of_split in samples.items()}


def _caption_images(folder: Path, *paths: str) -> list[bytes]:
    return [forms.put(folder / path, forms.jpeg()) for path in paths]


def karpathy_folder(name, folder, monkeypatch, hub) -> Made:
    kind = {"mscoco_captions": "coco"}.get(name, name)
    below = {"coco": "val2014", "flickr30k": "flickr30k-images", "flickr8k": "Flicker8k_Dataset"}[kind]
    images = _caption_images(folder, f"{below}/c.jpg", f"{below}/a.jpg", f"{below}/b.jpg", f"{below}/d.jpg")
    listed = below if kind == "coco" else ""
    rows = karpathy(
        (listed, "c.jpg", "test", ["A cat . ", "Two cats"]),
        (listed, "a.jpg", "restval" if kind == "coco" else "train", ["A dog"]),
        (listed, "b.jpg", "test", ["Ein Löwe", "a lion"]),
        (listed, "d.jpg", "val", ["A sea"]),
    )
    dump(folder / f"dataset_{kind}.json", rows)
    wanted: Wanted = {
        "test": [(["A cat .", "Two cats"], images[0]), (["Ein Löwe", "a lion"], images[2])],
        "train": [(["A dog"], images[1])],
        "val": [(["A sea"], images[3])],
    }
    return Made(["folder", str(folder)], (), (), wanted)


def flickr8k_tokens(name, folder, monkeypatch, hub) -> Made:
    images = _caption_images(folder, "Flicker8k_Dataset/a.jpg", "Flicker8k_Dataset/b.jpg")
    (folder / "Flickr8k.token.txt").write_text("a.jpg#0\tA man .\nb.jpg#0\tA dog\na.jpg#1\tA man again\n")
    (folder / "Flickr_8k.testImages.txt").write_text("b.jpg\n")
    (folder / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    wanted: Wanted = {"train": [(["A man .", "A man again"], images[0])], "test": [(["A dog"], images[1])]}
    return Made(["folder", str(folder)], (), (), wanted)


def flickr30k_tokens(name, folder, monkeypatch, hub) -> Made:
    images = _caption_images(folder, "flickr30k-images/1.jpg", "flickr30k-images/2.jpg")
    (folder / "results_20130124.token").write_text("1.jpg#0\tOne\n1.jpg#1\tEins\n2.jpg#0\tTwo\n")
    wanted: Wanted = {"test": [(["One", "Eins"], images[0]), (["Two"], images[1])]}
    return Made(["folder", str(folder)], (), (), wanted, note="not the 1k that papers report on")


Writer = Callable[..., Made]
CLASS_FOLDERS = ("caltech101", "caltech256", "country211", "dtd", "eurosat", "food101", "oxford_pets", "stanford_cars")
CAPTIONS = tuple(name for name, row in DATASETS.items() if row.classes == 0)
BY_COOP = tuple(name for name, row in DATASETS.items() if row.folder == "coop")
PREPARABLE = tuple(name for name in DATASETS if name not in ("digits", *BY_COOP))
CASES: list[tuple[str, Writer]] = [
    *((name, torchvision_folder) for name, row in DATASETS.items() if row.torchvision),
    ("eurosat", torchvision_download),
    *(
        (name, {"webdataset": hub_webdataset, "parquet": hub_parquet}[r.hub.form])
        for name, r in DATASETS.items()
        if r.hub
    ),
    *((name, class_folders) for name in CLASS_FOLDERS),
    ("imagenet", imagenet_folder),
    ("imagenet", imagenet_kaggle),
    ("tiny_imagenet", tiny_folder),
    *((name, coop_folder) for name in BY_COOP),
    *((name, karpathy_folder) for name in CAPTIONS),
    ("flickr30k", flickr30k_tokens),
    ("flickr8k", flickr8k_tokens),
    *((name, own_parquet) for name in PREPARABLE),
    *((name, local_webdataset) for name in PREPARABLE),
]
# Own files in whose reading nothing depends on the row but its class names: these differ, the others repeat them
DIFFER = {
    own_parquet: ("cifar10", "caltech101", "caltech256", "imagenet", "flickr8k"),
    coop_folder: ("ucf101", "dtd-coop"),
    local_webdataset: ("dtd", "sun397", "mscoco_captions"),
}


# Hundreds or thousands of images in forms whose records the tests of the sources hold; each row has another here
LARGE = (
    *(("imagenet", make) for make in (torchvision_folder, imagenet_folder, imagenet_kaggle)),
    *((name, class_folders) for name in ("caltech101", "caltech256", "country211", "stanford_cars", "food101")),
    ("country211", torchvision_folder),
    ("sun397", torchvision_folder),
)


def is_long(name: str, make: Writer) -> bool:
    return (name, make) in LARGE or (make in DIFFER and name not in DIFFER[make])


def test_every_source_of_every_row_is_here():
    kinds = {
        name: {make.__name__.split("_")[0] for of, make in CASES if of == name and make is not torchvision_download}
        for name in DATASETS
    }
    for name, row in DATASETS.items():
        places = {kind for kind, there in (("torchvision", row.torchvision), ("hub", row.hub)) if there}
        always = {"own", "local"} if name in PREPARABLE else set()
        assert kinds[name] >= places | always
        if row.folder != "imagefolder":
            assert kinds[name] & {"imagenet", "tiny", "karpathy", "coop"}


# The checks


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def same_images(got: list[bytes], wanted: list[bytes], arrays: bool) -> bool:
    if not arrays:
        return got == wanted
    return len(got) == len(wanted) and all(
        np.array_equal(pixels(g), pixels(w)) for g, w in zip(got, wanted, strict=True)
    )


def named_by_path(name: str, path: str) -> str | None:
    """The class that an image of published files belongs to by its path alone; None where paths do not tell."""
    parts = PurePosixPath(path).parts
    folder = parts[-2]
    if name == "imagenet":
        wnids = forms.imagenet_wnids()
        return NAMES[name][wnids.index(folder)] if folder in wnids else None
    if name == "tiny_imagenet":
        return NAMES[name][parts[-3]] if folder == "images" and parts[-3][0] == "n" else None
    if name in ("caltech101", "eurosat", "country211"):
        return NAMES[name][folder]
    if name == "sun397":
        return " ".join(parts[2:-1]).replace("_", " ")
    if name == "caltech256":
        known = {"001.ak47": "ak47", "002.american-flag": "american flag", "251.airplanes-101": "airplanes"}
        return known.get(folder, folder[4:].removesuffix("-101").replace("-", " "))
    spoken = {"dtd": folder, "food101": folder, "oxford_pets": parts[-1].rpartition("_")[0]}
    by_plain = {n.casefold(): n for n in NAMES.get(name, ())}
    wanted = folder if name == "oxford_pets" and parts[-3] in ("train", "test") else spoken.get(name)
    return by_plain[wanted.replace("_", " ").casefold()] if wanted else None


def check_files(name: str, folder: Path, made: Made) -> None:
    """What is on disk, by pyarrow and hashlib."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["name"] == name and set(manifest["splits"]) == set(made.wanted)
    assert tuple(manifest["class_names"]) == made.meant and tuple(manifest["raw_names"]) == made.raw
    assert made.note in " ".join(manifest["notes"])
    there = {p.name for p in folder.iterdir() if p.name != ".lock"}
    listed = set()
    for split, expected in made.wanted.items():
        told = manifest["splits"][split]
        files = [*told["shards"], told["index"]]
        listed |= {f["file"] for f in files}
        for file in files:
            data = (folder / file["file"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert [f["file"] for f in told["shards"]] == sorted(p.name for p in folder.glob(f"{split}-*.parquet"))
        table = pq.read_table([folder / f["file"] for f in told["shards"]])
        targets, images = [t for t, _ in expected], [i for _, i in expected]
        assert (told["rows"], told["rejected"], told["converted"]) == (len(expected), 0, {})
        assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        stored = table["image"].combine_chunks()
        index = np.load(folder / told["index"]["file"])
        raw = [(folder / s["file"]).read_bytes() for s in told["shards"] for _ in range(s["rows"])]
        places = zip(raw, index["offset"].tolist(), index["size"].tolist(), strict=True)
        assert [shard[at : at + size] for shard, at, size in places] == stored.field("bytes").to_pylist()
        assert same_images(stored.field("bytes").to_pylist(), images, made.arrays)
        metadata = {key: json.loads(value) for key, value in table.schema.metadata.items()}
        features = metadata[b"huggingface"]["info"]["features"]
        assert tuple(metadata[b"rayclip"]["raw_names"]) == made.raw
        if not made.meant:
            assert table.column_names == ["image", "captions"] and table["captions"].to_pylist() == targets
            assert set(index["label"]) == {-1} and told["per_class"] == []
            continue
        assert table.column_names == ["image", "label"] and table["label"].to_pylist() == targets
        assert features["label"] == {"names": list(made.meant), "_type": "ClassLabel"}
        assert told["per_class"] == [targets.count(label) for label in range(len(made.meant))]
        assert index["label"].tolist() == targets
        if made.source[0] in ("torchvision", "folder"):
            by_path = [named_by_path(name, path) for path in stored.field("path").to_pylist()]
            assert [made.meant[t] if p else None for t, p in zip(targets, by_path, strict=True)] == by_path
    assert there == listed | {"manifest.json"}


def check_opened(name: str, root: Path, made: Made) -> None:
    """What everything else in the program sees."""
    expected = made.wanted[DATASETS[name].evaluated]
    images = [pixels(image) for _, image in expected]
    positions = range(0, len(expected), 1 + len(expected) // 50)
    if not made.meant:
        pairs = open_pairs(str(root / name))
        assert pairs.name == name and [list(c) for c in pairs.captions] == [captions for captions, _ in expected]
        shown = pairs.images(positions)
    else:
        data = open_data(str(root / name), "test")
        assert data.labels.tolist() == [label for label, _ in expected]
        assert (data.name, data.class_names, data.raw_names) == (name, made.meant, made.raw)
        assert data.resize == DATASETS[name].resize
        assert open_data(name, "test", names="raw").class_names == made.raw, "by its name, from RAYCLIP_DATA"
        shown = data.images(positions)
    assert all(np.array_equal(np.asarray(s), images[p]) for s, p in zip(shown, positions, strict=True))


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.mark.parametrize(
    ("name", "make"),
    [pytest.param(*case, marks=[pytest.mark.slow] * is_long(*case)) for case in CASES],
    ids=[f"{name}-{make.__name__}" for name, make in CASES],
)
def test_a_row_is_prepared_from_a_source(name, make, tmp_path, monkeypatch, capsys, request):
    hub = request.getfixturevalue("hub") if make in (hub_webdataset, hub_parquet) else None
    root, row = tmp_path / "root", DATASETS[name]
    monkeypatch.setenv("RAYCLIP_DATA", str(root))
    monkeypatch.setenv("COLUMNS", "500")  # no path is folded
    (tmp_path / "source").mkdir()
    made = make(name, tmp_path / "source", monkeypatch, hub)

    def data(*args):
        code, out, err = call(monkeypatch, capsys, "data", *args)
        assert (code, err) == (0, "")
        return out

    command = ("prepare", name, "--source", *made.source, "--root", root, "--quiet")
    said = data(*command)
    assert said.startswith(f"{name}: prepared in {root / name}\n")
    assert all(f"  {split}: {len(expected):,} images; 1 shard" in said for split, expected in made.wanted.items())
    check_files(name, root / name, made)
    check_opened(name, root, made)
    assert data("verify", name, "--root", root, "--quiet").startswith(f"{name}: as its manifest says\n")
    before = state(root)
    assert data(*command).startswith(f"{name}: is already prepared in {root / name}\n")
    assert state(root) == before, "a second run does nothing"
    shown = " ".join(data("show", name, "--root", root).split())
    assert row.title in shown and f"prepared in {root / name}" in shown
    assert all(f"{split}: {len(w):,} images" in shown for split, w in made.wanted.items())
    assert all(f"{meant} " in shown for meant in made.meant[:3])
    listed = json.loads(data("list", "--json", "--root", root))
    counts = {d["name"]: d["prepared"] for d in listed["data_sets"]}
    assert counts == {n: {} for n in DATASETS} | {name: {s: len(w) for s, w in made.wanted.items()}}


@pytest.mark.parametrize(
    "name", [n for n, row in DATASETS.items() if row.hub and row.curated not in (None, "imagenet")]
)
def test_an_upload_that_spells_classes_as_we_do_is_followed_in_its_own_order(name, hub, tmp_path, monkeypatch, capsys):
    """Two classes called alike, as ImageNet has, cannot be told apart by name: there the order counts."""
    row = DATASETS[name]
    pairs = [(m.upper().replace(" ", "_"), m) for m in (m for _, m in published(name))]
    if name == "caltech101":
        pairs = [(n.upper(), n) for n in NAMES["caltech101_vtab"]]
    pairs = pairs[3:] + pairs[:3] if len(pairs) > 3 else pairs[::-1]
    if row.hub.form == "parquet":
        hub_forms.make_parquet(hub.root / row.hub.repo, {row.hub.splits[row.evaluated]: 5}, [raw for raw, _ in pairs])
    else:
        hub_forms.make_wds(hub.root / row.hub.repo, {row.hub.splits[row.evaluated]: 5}, [raw for raw, _ in pairs])
    args = ("data", "prepare", name, "--source", "hub", "--splits", "evaluated", "--root", tmp_path / "root", "--quiet")
    code, _, err = call(monkeypatch, capsys, *args)
    assert (code, err) == (0, "")
    (file,) = (tmp_path / "root" / name).glob("*-00000.parquet")
    raw, meant = _columns(pairs)
    features = json.loads(pq.read_schema(file).metadata[b"huggingface"])["info"]["features"]
    assert tuple(features["label"]["names"]) == meant
    assert json.loads(pq.read_schema(file).metadata[b"rayclip"])["raw_names"] == list(raw)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("dtd", torchvision_folder),
        pytest.param("stl10", torchvision_folder, marks=pytest.mark.ci),
        pytest.param("food101", hub_parquet, marks=pytest.mark.ci),
        ("country211", hub_webdataset),
        pytest.param("country211", class_folders, marks=pytest.mark.ci),
        pytest.param("tiny_imagenet", tiny_folder, marks=pytest.mark.ci),
        ("flickr8k", karpathy_folder),
        ("pcam", own_parquet),
        pytest.param("pcam", local_webdataset, marks=pytest.mark.ci),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_evaluated_split_can_come_first_and_the_others_later(name, make, hub, tmp_path, monkeypatch, capsys):
    root, row = tmp_path / "root", DATASETS[name]
    monkeypatch.setenv("RAYCLIP_DATA", str(root))
    (tmp_path / "source").mkdir()
    made = make(name, tmp_path / "source", monkeypatch, hub)
    command = ("data", "prepare", name, "--source", *made.source, "--quiet")
    assert call(monkeypatch, capsys, *command, "--splits", "evaluated")[::2] == (0, "")
    check_opened(name, root, made)
    first = {file: written for file, written in state(root).items() if file.startswith((row.evaluated, "index-"))}
    assert first
    with pytest.raises(UserError, match="adds the missing split"):
        open_data(name, "train") if row.classes else open_pairs(name, "train")
    for _ in range(2):
        code, _, err = call(monkeypatch, capsys, *command)
        assert (code, err) == (0, "")
    check_files(name, root / name, made)
    assert first.items() <= state(root).items()
    before = state(root)
    code, said, _ = call(monkeypatch, capsys, *command, "--splits", "train")
    assert code == 0 and "is already prepared" in said and state(root) == before


def test_cocos_own_validation_images_are_not_taken_for_karpathys_test(tmp_path, monkeypatch, capsys):
    images = _caption_images(tmp_path / "coco", "val2017/1.jpg", "val2017/2.jpg")
    annotations = coco([(2, "2.jpg"), (1, "1.jpg")], [(1, "one"), (2, "two"), (1, "eins")])
    dump(tmp_path / "coco/annotations/captions_val2017.json", annotations)
    source = ("--source", "folder", tmp_path / "coco", "--root", tmp_path / "root", "--quiet")
    code, out, _ = call(monkeypatch, capsys, "data", "prepare", "mscoco_captions", *source)
    assert code == 0 and "not Karpathy's 5k test" in out
    table = pq.read_table(tmp_path / "root/mscoco_captions/val-00000.parquet")
    assert table["captions"].to_pylist() == [["two"], ["one", "eins"]]
    assert table["image"].combine_chunks().field("bytes").to_pylist() == images[::-1]
    assert open_pairs(str(tmp_path / "root/mscoco_captions"), "val").captions == (("two",), ("one", "eins"))
    with pytest.raises(UserError, match="only val is prepared"):
        open_pairs(str(tmp_path / "root/mscoco_captions"))


@pytest.mark.parametrize("source", [[], ["torchvision"], ["hub"], ["hub", "org/digits"], ["folder", "."]])
def test_digits_come_with_the_program_and_cannot_be_prepared(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--source", *source] if source else []
    code, out, err = call(monkeypatch, capsys, "data", "prepare", "digits", *args, "--root", "root")
    assert (code, out) == (2, "")
    assert err == "error: 'digits' comes with the program: there is nothing to prepare.\n"
    assert list(tmp_path.iterdir()) == []
    assert len(open_data("digits", "test")) == DATASETS["digits"].splits["test"]

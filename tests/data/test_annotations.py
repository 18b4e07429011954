"""The published forms of image-caption data, in miniature: what is there, and whatever can be wrong with it."""

import json

import pytest

from data.test_data import png
from rayclip.data.sources.annotations import CaptionFolder
from rayclip.types import UserError


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png("red"))


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def sentences(*texts):
    return [{"raw": text, "tokens": text.split(), "imgid": 0} for text in texts]


def karpathy(*rows):
    """Rows of (folder, name, split, captions)."""
    entries = [
        {"filename": name, "split": split, "sentences": sentences(*captions)} | ({"filepath": below} if below else {})
        for below, name, split, captions in rows
    ]
    return {"images": entries, "dataset": "coco"}


def coco(images, annotations):
    return {
        "images": [{"id": i, "file_name": name, "height": 480} for i, name in images],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(annotations)],
    }


def told(source, split):
    return [(r.path, r.captions, r.problem) for r in source.records(split)]


KARPATHY = karpathy(
    ("val2014", "c.jpg", "test", [" A cat . ", "Two cats\n"]),
    ("val2014", "a.jpg", "restval", ["A dog"]),
    ("train2014", "b.jpg", "train", ["A lemon"]),
    ("val2014", "d.jpg", "val", ["A sea"]),
    ("val2014", "e.jpg", "test", ["A hill"]),
)


@pytest.fixture
def mscoco(tmp_path):
    images(tmp_path, *(f"val2014/{n}.jpg" for n in "cade"), "train2014/b.jpg")
    dump(tmp_path / "annotations/dataset_coco.json", KARPATHY)
    return tmp_path


def test_karpathys_coco(mscoco):
    source = CaptionFolder(mscoco, "mscoco")
    assert source.splits() == {"test": 2, "train": 2, "val": 1} and source.class_names == () and source.notes == ()
    assert told(source, "test") == [
        ("val2014/c.jpg", ("A cat .", "Two cats"), None),
        ("val2014/e.jpg", ("A hill",), None),
    ]
    assert [r.path for r in source.records("train")] == ["val2014/a.jpg", "train2014/b.jpg"], "restval is train"
    (last,) = source.records("test", start=1)
    assert last.path == "val2014/e.jpg" and last.read() == png("red") and last.label is None
    assert json.loads(json.dumps(source.describe())) == CaptionFolder(mscoco, "mscoco").describe()
    with pytest.raises(UserError, match="has no split 'dev'"):
        source.records("dev")


def test_karpathy_wins_over_cocos_own_and_descriptions_tell(mscoco):
    dump(mscoco / "annotations/captions_val2014.json", coco([(1, "c.jpg")], [(1, "x")]))
    source = CaptionFolder(mscoco, "mscoco")
    assert "test" in source.splits()
    before = source.describe()
    dump(mscoco / "annotations/dataset_coco.json", karpathy(("val2014", "c.jpg", "test", ["other"])))
    assert CaptionFolder(mscoco, "mscoco").describe() != before


def test_flickr_by_karpathy_without_folders_in_names(tmp_path):
    images(tmp_path, "flickr30k-images/1.jpg", "2.jpg")
    dump(tmp_path / "dataset_flickr30k.json", karpathy(("", "1.jpg", "test", ["one"]), ("", "2.jpg", "test", ["two"])))
    assert [r.path for r in CaptionFolder(tmp_path, "flickr30k").records("test")] == [
        "flickr30k-images/1.jpg",
        "2.jpg",
    ]


def test_cocos_own_annotations_without_karpathys(tmp_path):
    images(tmp_path, "val2017/000002.jpg", "val2017/000001.jpg", "000003.jpg")
    dump(
        tmp_path / "annotations/captions_val2017.json",
        coco([(2, "000002.jpg"), (1, "000001.jpg"), (3, "000003.jpg")], [(1, "b"), (2, "a "), (1, "c"), (3, "d")]),
    )
    dump(tmp_path / "annotations/captions_val2014.json", coco([(1, "x.jpg")], [(1, "x")]))
    source = CaptionFolder(tmp_path, "coco")
    assert source.splits() == {"val": 3}
    assert told(source, "val") == [
        ("val2017/000002.jpg", ("a",), None),
        ("val2017/000001.jpg", ("b", "c"), None),
        ("000003.jpg", ("d",), None),
    ]
    assert any("not Karpathy's 5k test" in n for n in source.notes)
    assert any("captions_val2014.json: of another year" in n for n in source.notes)


def test_cocos_train_and_val_of_one_year(tmp_path):
    images(tmp_path, "train2014/1.jpg", "val2014/2.jpg")
    dump(tmp_path / "captions_train2014.json", coco([(1, "1.jpg")], [(1, "a")]))
    dump(tmp_path / "captions_val2014.json", coco([(2, "2.jpg")], [(2, "b")]))
    source = CaptionFolder(tmp_path, "mine")
    assert source.splits() == {"train": 1, "val": 1}
    assert [told(source, s)[0][0] for s in ("train", "val")] == ["train2014/1.jpg", "val2014/2.jpg"]


def test_flickr8ks_token_file_and_lists(tmp_path):
    images(tmp_path, *(f"Flicker8k_Dataset/{n}.jpg" for n in "abc"))
    lines = [
        "a.jpg#0\tA man .",
        "a.jpg#1\tA man # 2\tagain",
        "b.jpg#0\tA dog",
        "",
        "c.jpg#0\tSea",
        "broken",
        "d.jpg.1#0\tx",
    ]
    (tmp_path / "Flickr8k.token.txt").write_text("\r\n".join(lines))
    (tmp_path / "Flickr_8k.testImages.txt").write_text("b.jpg\na.jpg\nz.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("c.jpg")
    source = CaptionFolder(tmp_path, "flickr8k")
    assert source.splits() == {"val": 1, "test": 3}
    test = told(source, "test")
    assert test[:2] == [
        ("Flicker8k_Dataset/b.jpg", ("A dog",), None),
        ("Flicker8k_Dataset/a.jpg", ("A man .", "A man # 2\tagain"), None),
    ]
    assert test[2][0] == "z.jpg" and "no image z.jpg" in test[2][2]
    assert source.notes == (
        "1 lines of Flickr8k.token.txt that are no NAME#NUMBER and sentence are left out.",
        "1 images that no list names are left out.",
    )


def test_flickr30ks_token_file_is_one_split_and_says_so(tmp_path):
    images(tmp_path, "flickr30k-images/1.jpg")
    (tmp_path / "results_20130124.token").write_text("1.jpg#0\tOne\n1.jpg#1\tEins\n")
    source = CaptionFolder(tmp_path, "flickr30k")
    assert told(source, "test") == [("flickr30k-images/1.jpg", ("One", "Eins"), None)]
    assert "not the 1k" in source.notes[0]


def test_nothing_goes_missing_in_silence(tmp_path):
    images(tmp_path, "val2014/a.jpg", "val2014/b.jpg")
    annotations = karpathy(
        ("val2014", "a.jpg", "test", []),
        ("val2014", "gone.jpg", "test", ["x"]),
        ("val2014", "b.jpg", "test", ["kept", "  "]),
        ("val2014", "b.jpg", "test", ["again"]),
        ("val2014", "c.jpg", "minival", ["x"]),
    )
    annotations["images"] += ["text", {"split": "test"}, {"filename": 3, "split": "test", "sentences": "no list"}]
    annotations["images"].append({"filename": "half \ud800", "split": "test", "sentences": [{"raw": "\ud800"}, 7]})
    annotations["images"].append({"filename": "x" * 3000, "split": "test", "sentences": []})
    dump(tmp_path / "dataset_coco.json", annotations)
    source = CaptionFolder(tmp_path, "coco")
    problems = [r.problem for r in source.records("test")]
    assert problems == [
        "the image has no captions",
        "there is no image val2014/gone.jpg",
        None,
        "the image is listed twice",
        "the annotations name no file",
        "the annotations name no file",
        "the annotations name no file",
        f"there is no image {'x' * 3000}",
    ]
    assert source.notes == (
        "3 captions without text are left out.",
        "2 entries of dataset_coco.json that belong to no known split are left out.",
    )


def test_cocos_strange_annotations_are_counted(tmp_path):
    images(tmp_path, "val2014/a.jpg")
    content = coco([(1, "a.jpg"), (1, "a.jpg"), (2, "b.jpg")], [(1, "x"), (9, "y"), (9, "z"), ([1], "list"), (1, None)])
    content["annotations"].append("text")
    content["images"].append(None)
    dump(tmp_path / "captions_val2014.json", content)
    source = CaptionFolder(tmp_path, "coco")
    assert [r.problem for r in source.records("val")] == [
        None,
        "the image is listed twice",
        "there is no image val2014/b.jpg",
        "the annotations name no file",
    ]
    assert set(source.notes) > {
        "1 captions that name no image are left out.",
        "2 captions without text are left out.",
        "2 captions of images that captions_val2014.json does not list are left out.",
    }


@pytest.mark.parametrize(
    "name",
    ["../secret.jpg", "/etc/hostname", "a/../../secret.jpg", "C:\\x.jpg", "..\\secret.jpg", "\\\\host\\x", "a\0b"],
)
def test_names_do_not_leave_the_folder(tmp_path, name):
    folder = tmp_path / "set"
    images(tmp_path, "secret.jpg")
    dump(folder / "dataset_coco.json", karpathy(("", name, "test", ["x"])))
    (record,) = CaptionFolder(folder, "coco").records("test")
    assert "leads out of the folder" in record.problem
    with pytest.raises(ValueError):
        record.read()


@pytest.mark.parametrize("below", ["..", "/etc"])
def test_nor_do_folders(tmp_path, below):
    images(tmp_path, "secret.jpg")
    dump(tmp_path / "set/dataset_coco.json", karpathy((below, "secret.jpg", "test", ["x"])))
    (record,) = CaptionFolder(tmp_path / "set", "coco").records("test")
    assert "leads out of the folder" in record.problem


@pytest.mark.parametrize(
    ("files", "name", "says"),
    [
        ({}, "coco", "none of dataset_coco.json, captions_val2017.json, .* is there or in .*annotations"),
        ({}, "pairs", "dataset_coco.json.*results_20130124.token.*Flickr8k.token.txt"),
        ({"dataset_flickr8k.json": KARPATHY}, "coco", "none of dataset_coco.json"),
        ({"dataset_coco.json": '{"images": [{"filen'}, "coco", "dataset_coco.json is no readable JSON"),
        ({"dataset_coco.json": "[" * 100_000}, "coco", "is no readable JSON"),
        ({"dataset_coco.json": []}, "coco", "has no list 'images'"),
        ({"dataset_coco.json": {"images": []}}, "coco", "tells of no images"),
        ({"captions_val2014.json": {"images": []}}, "coco", "has no list 'annotations'"),
        ({"dataset_coco.json": KARPATHY, "dataset_flickr8k.json": KARPATHY}, "pairs", "of several data sets"),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path, files, name, says):
    for file, content in files.items():
        dump(tmp_path / file, content)
    with pytest.raises(UserError, match=says) as error:
        CaptionFolder(tmp_path, name)
    assert "\n" not in str(error.value)


def test_broken_text_and_no_folder(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_bytes(b"a.jpg#0\t\xff\xfe")
    with pytest.raises(UserError, match="no UTF-8"):
        CaptionFolder(tmp_path, "flickr8k")
    with pytest.raises(UserError, match="there is no folder"):
        CaptionFolder(tmp_path / "nothing", "flickr8k")


def test_karpathys_three_files_unpack_into_one_folder(tmp_path):
    images(tmp_path, "1.jpg")
    for kind in ("coco", "flickr8k", "flickr30k"):
        dump(tmp_path / f"dataset_{kind}.json", karpathy(("", "1.jpg", "test", [kind])))
    for name, kind in (("mscoco", "coco"), ("flickr8k", "flickr8k"), ("flickr30k", "flickr30k")):
        assert told(CaptionFolder(tmp_path, name), "test") == [("1.jpg", (kind,), None)]

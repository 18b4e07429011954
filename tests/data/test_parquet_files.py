import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.hub_forms import image_structs, make_parquet, picture, write_parquet
from rayclip.data.labels import Reading
from rayclip.data.sources.parquet_files import ParquetSource, open_parquet
from rayclip.types import UserError

NAMES = ("cat", "dog", "lemon")


def read(source, split, start=0):
    return [(r.read(), r.label if source.class_names else list(r.captions)) for r in source.records(split, start)]


@pytest.mark.parametrize("layout", ["data/{split}-{i:05d}-of-{n:05d}.parquet", "{split}-{i}.parquet"])
def test_a_folder_is_read_in_order_and_from_any_record_on(tmp_path, layout):
    written = make_parquet(tmp_path, {"train": 11, "validation": 3, "test": 6}, layout=layout, per_file=5, row_group=2)
    source = open_parquet(tmp_path, "mine")
    assert source.class_names == NAMES
    assert source.splits() == {"train": 11, "val": 3, "test": 6}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        for start in range(len(written[name]) + 2):
            assert read(source, split, start) == written[name][start:]
    paths = [r.path for r in source.records("train")]
    assert len(set(paths)) == 11 and str(tmp_path) not in "".join(paths)
    with pytest.raises(UserError, match=r"no split 'dev': it has train, val, test"):
        source.records("dev")


@pytest.mark.parametrize("image", ["image", "img", "jpg", "png", "webp"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "cls", "class"])
def test_columns_as_found_in_the_wild(tmp_path, image, label):
    written = make_parquet(tmp_path, {"test": 4}, image=image, label=label)
    assert read(open_parquet(tmp_path, "mine"), "test") == written["test"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_as_plain_bytes(tmp_path, kind):
    columns = {"image": pa.array([picture(0), None, b""], kind), "label": [0, 1, 2], "coarse_label": [9, 9, 9]}
    records = list(open_parquet(write_parquet(tmp_path / "a.parquet", columns, NAMES), "a").records("test"))
    assert records[0].read() == picture(0) and records[0].problem is None
    assert [record.problem for record in records[1:]] == ["the row has no image"] * 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_labels_are_sorted_into_classes(tmp_path, kind):
    for split, labels in (("train", ["pear", None, "apple"]), ("test", ["fig", "pear"])):
        columns = {"image": image_structs([picture(i) for i in range(len(labels))]), "label": pa.array(labels, kind)}
        write_parquet(tmp_path / f"{split}.parquet", columns)
    source = open_parquet(tmp_path, "fruit")
    assert source.class_names == ("apple", "fig", "pear")
    assert [(r.label, r.problem) for r in source.records("train")] == [
        (2, None),
        (None, "the row has no label"),
        (0, None),
    ]
    assert [r.label for r in source.records("test")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("captions", [["one", " two "], ["three"]]),
        ("caption", ["one", "three"]),
        ("sentences", [[{"raw": "one", "sentid": 1}, {"raw": "two", "sentid": 2}], [{"raw": "three", "sentid": 3}]]),
        ("text", ["one", "three"]),
        ("raw", [["one", "two"], ["three"]]),
        ("caption", [{"raw": "one"}, {"raw": "three"}]),
    ],
)
def test_captions_as_found_in_the_wild(tmp_path, name, values):
    columns = {"image": image_structs([picture(0), picture(1)]), name: values}
    source = open_parquet(write_parquet(tmp_path / "val.parquet", columns), "c")
    first, second = source.records("val")
    assert source.class_names == () and first.label is None and first.captions[0] == "one"
    assert len(first.captions) == (2 if "two" in str(values) else 1) and second.captions == ("three",)


def test_captions_can_be_wanted_where_there_are_labels(tmp_path):
    columns = {"image": image_structs([picture(0)]), "label": [0], "caption": ["one"]}
    path = write_parquet(tmp_path / "test.parquet", columns, NAMES)
    assert next(ParquetSource({"test": [path]}, "c", captions=True).records("test")).captions == ("one",)
    assert next(ParquetSource({"test": [path]}, "c").records("test")).label == 0


def test_what_cannot_be_used_says_why(tmp_path):
    labels = pa.array([0, None, -1, 2, 2], pa.int64())
    columns = {"image": image_structs([picture(0), picture(1), picture(2), picture(3), None]), "label": labels}
    records = list(open_parquet(write_parquet(tmp_path / "a.parquet", columns, NAMES), "a").records("test"))
    assert [r.problem for r in records] == [
        None,
        "the row has no label",
        "the row has no label (-1)",
        None,
        "the row has no image, and there is no file 4.png",
    ]
    assert [r.label for r in records] == [0, None, None, 2, 2]
    assert records[1].read() == picture(1)  # the image itself is fine
    whole = pa.array([None, {"bytes": picture(1), "path": None}], image_structs([]).type)
    columns = {"image": whole, "captions": pa.array([["one"], ["", " "]])}
    records = list(open_parquet(write_parquet(tmp_path / "b.parquet", columns), "b").records("test"))
    assert [r.problem for r in records] == ["the row has no image", "the row has no caption"]


def test_class_names_of_the_files_come_before_those_given(tmp_path):
    make_parquet(tmp_path / "named", {"test": 3})
    make_parquet(tmp_path / "bare", {"test": 3}, class_names=None)
    (tmp_path / "names").write_text("\n".join(NAMES[::-1]))
    given = Reading(names=str(tmp_path / "names"))
    assert open_parquet(tmp_path / "named", "n", reading=given).class_names == NAMES  # the same, in the data's order
    assert open_parquet(tmp_path / "bare", "n", reading=given).class_names == NAMES[::-1]
    with pytest.raises(UserError, match=r"names no classes: .*ClassLabel for 'label'"):
        open_parquet(tmp_path / "bare", "n")


@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"names": 3}}}}'])
def test_metadata_that_says_nothing_is_no_crash(tmp_path, metadata):
    table = pa.table({"image": image_structs([picture(0)]), "label": [0]}).replace_schema_metadata(
        {"huggingface": metadata}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"names no classes"):
        open_parquet(tmp_path / "a.parquet", "a")


def test_the_description_tells_the_content_and_no_path(tmp_path):
    for name, counts in (("a", {"test": 5}), ("b", {"test": 5}), ("c", {"test": 4}), ("d", {"train": 5})):
        make_parquet(tmp_path / name, counts)
    a, b, c, d = (open_parquet(tmp_path / name, "x").describe() for name in "abcd")
    assert a == b and len({x["content"] for x in (a, c, d)}) == 3
    assert str(tmp_path) not in json.dumps(a)


@pytest.mark.parametrize(
    ("name", "split"), [("train-a", "train"), ("validation", "val"), ("test", "test"), ("x", "test")]
)
def test_one_file_is_one_split(tmp_path, name, split):
    columns = {"image": image_structs([picture(0)]), "label": [0]}
    assert open_parquet(write_parquet(tmp_path / f"{name}.parquet", columns, NAMES), "x").splits() == {split: 1}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "none", "no such data file or folder"),
        (lambda p: p / "none.parquet", "no such data file"),
        (lambda p: p, r"holds no Parquet data set: it needs train\*.parquet"),
        (lambda p: [(p / "x.parquet").write_text("hello"), p / "x.parquet"][1], "no readable Parquet file"),
        (lambda p: [(p / "x.parquet").write_bytes(b""), p / "x.parquet"][1], "no readable Parquet file"),
        (
            lambda p: write_parquet(p / "x.parquet", {"image": [3], "label": [0]}),
            "has no image column .*image, label",
        ),
        (lambda p: write_parquet(p / "x.parquet", {"image": [b"x"], "label": [[0]]}), "no labels or captions"),
    ],
)
def test_wrong_files_are_explained_in_one_sentence(tmp_path, make, match):
    with pytest.raises(UserError, match=match) as caught:
        open_parquet(make(tmp_path), "x")
    assert "\n" not in str(caught.value)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    make_parquet(tmp_path / "a", {"train": 2})
    make_parquet(tmp_path / "a", {"test": 2}, class_names=("dog", "cat", "lemon"))
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet names other classes"):
        open_parquet(tmp_path / "a", "x")
    make_parquet(tmp_path / "a", {"test": 2}, label="class")
    with pytest.raises(UserError, match="names other classes or columns"):
        open_parquet(tmp_path / "a", "x")


def test_row_groups_before_the_start_are_not_read(tmp_path, monkeypatch):
    make_parquet(tmp_path, {"test": 10}, per_file=10, row_group=3)
    source = open_parquet(tmp_path, "x")
    asked = []
    plain = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda s, *a, **k: [asked.append(k["row_groups"]), plain(s, *a, **k)][1]
    )
    records = source.records("test", 7)
    assert next(records).read() == picture(7) and asked == [[2]]  # and no further than the record asked for
    assert len(list(records)) == 2 and asked == [[2], [3]]
    assert list(source.records("test", 10)) == [] and asked == [[2], [3]]


def test_the_images_of_a_row_group_or_so_are_in_memory(tmp_path):
    images = [bytes([i]) * 100_000 for i in range(120)]
    path = write_parquet(
        tmp_path / "a.parquet", {"image": image_structs(images), "label": [0] * 120}, NAMES, row_group=10
    )
    images.clear()
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in open_parquet(path, "a").records("test"))
    assert most < 40 * 100_000  # of 120 images

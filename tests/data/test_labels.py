"""Labels and class names: what does not fit is said; nothing is shifted, dropped or reordered in silence."""

import json

import numpy as np
import pyarrow as pa
import pytest

from data import forms
from data.hub_forms import image_structs, make_wds, picture, write_parquet, write_tar
from data.test_data import png, write
from rayclip.data import batch_pixels, open_data
from rayclip.data.catalog import prepare_named
from rayclip.data.labels import Reading, read_class_names, with_given_names
from rayclip.data.manifest import MANIFEST
from rayclip.models import ZeroShot, load_model
from rayclip.store import Store
from rayclip.types import UserError

NAMES = ("cat", "dog", "lemon")


def prepare(tmp_path, kind, location, name="mine", **reading):
    root, given = Store(str(tmp_path / "root")), Reading(**reading)
    manifest = prepare_named(name, root, kind=kind, location=str(location), reading=given)
    return manifest, open_data(str(tmp_path / "root" / name), "test")


def names_file(tmp_path, names=NAMES, file="names.txt"):
    return str(forms.put(tmp_path / file, "\n".join(names) + "\n") and tmp_path / file)


# Labels 1..K


def test_labels_from_1_are_named_and_read_when_told_so(tmp_path):
    path = write(tmp_path / "one.parquet", [1, 2, 3, 3])
    with pytest.raises(UserError) as caught:
        open_data(path, "test")
    said = str(caught.value)
    assert "labels from 1 to 3 for 3 class names, which are labels 0 to 2: they seem to be counted from 1" in said
    assert f"{path}#labels-from=1" in said
    assert f"`rayclip data prepare one --source parquet {path} --labels-from 1`" in said
    with pytest.raises(UserError, match=r"counted from 1: add --labels-from 1\."):
        prepare(tmp_path, "parquet", path)
    assert not list((tmp_path / "root").rglob(MANIFEST))
    read = open_data(f"{path}#labels-from=1", "test")
    _, prepared = prepare(tmp_path, "parquet", path, labels_from=1)
    for data in (read, prepared):
        assert data.labels.tolist() == [0, 1, 2, 2] and data.class_names == NAMES and data.notes == ()


def test_reading_labels_otherwise_is_other_data(tmp_path):
    path = write(tmp_path / "a.parquet", [1, 2, 1])
    one, zero = open_data(f"{path}#labels-from=1", "test"), open_data(path, "test")
    assert one.labels.tolist() == [0, 1, 0] and zero.labels.tolist() == [1, 2, 1]
    assert one.fingerprint != zero.fingerprint


def test_the_users_40_images_keep_their_names(shared):
    file = shared / "inputs/labels_from_1/labels1.parquet"
    if not file.is_file():
        pytest.skip(f"no file {file}")
    with pytest.raises(UserError, match=r"labels from 1 to 10 for 10 class names, .* counted from 1"):
        open_data(str(file), "test")
    data = open_data(f"{file}#labels-from=1", "test")
    assert len(data) == 40 and np.bincount(data.labels).tolist() == [4] * 10
    assert data.class_names[data.labels[0]] == "airplane"
    model = load_model(f"local-dir:{shared / 'models/pocket-clip'}")
    pixels = batch_pixels(data, range(40), "model", model.image_size).float() / 255
    right = ZeroShot(model, data.class_names)(pixels).argmax(1).numpy() == data.labels
    assert right.sum() == 22  # 55 %; with class "truck" dropped and the other names shifted it was 2.8 %


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, 3], r"the label 3 \(4 classes\), but 3 class names, which are labels 0 to 2: name every class"),
        ([0, 1, 2, 9, 12], "labels 9, 12, but 3 class names"),
        ([-2, 0, 1], "the label -2, but 3 class names"),
        ([10, 20, 30], "labels 10, 20, 30, but 3 class names"),
        ([2, 3, 3], "labels from 2 to 3 for 3 class names, .* counted from 1"),
        ([0, *range(3, 12)], r"labels 3, 4, 5, 6, 7 and 4 more, but 3 class names"),
    ],
)
def test_labels_without_a_name_are_an_error_and_no_rejects(tmp_path, labels, says):
    path = write(tmp_path / "x.parquet", labels)
    for opened in (lambda: open_data(path, "test"), lambda: prepare(tmp_path, "parquet", path)):
        with pytest.raises(UserError, match=says) as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "root").rglob("*.parquet"))


def test_class_names_for_every_label_are_the_remedy(tmp_path):
    path = write(tmp_path / "x.parquet", [0, 1, 3])
    four = names_file(tmp_path, [*NAMES, "yak"])
    data = open_data(f"{path}#names={four}", "test")
    assert data.class_names == (*NAMES, "yak") and data.labels.tolist() == [0, 1, 3]
    assert "it names 4 classes, the data 3" in data.notes[0] and "'lemon'" in data.notes[1]
    assert prepare(tmp_path, "parquet", path, names=four)[1].class_names == (*NAMES, "yak")


def test_a_label_that_comes_late_stops_a_webdataset_too(tmp_path):
    members = [
        (f"{i}.{end}", data)
        for i, label in enumerate([1, 2, 3])
        for end, data in (("cls", b"%d" % label), ("png", picture(i)))
    ]
    write_tar(tmp_path / "wds/test-000000.tar", members)
    forms.put(tmp_path / "wds/classnames.txt", "\n".join(NAMES))
    with pytest.raises(UserError, match=r"test-000000.tar/2 has labels from 3 to 3 .*--labels-from 1"):
        prepare(tmp_path, "webdataset", tmp_path / "wds")
    assert not list((tmp_path / "root").rglob(MANIFEST))
    write_tar(tmp_path / "wds/test-000001.tar", members[:4])
    manifest, data = prepare(tmp_path, "webdataset", tmp_path / "wds", labels_from=1)
    assert data.labels.tolist() == [0, 1, 2, 0, 1] and manifest.splits["test"].rejected == 0
    assert data.archives() == (3, 2)


def test_a_class_without_images_is_told(tmp_path):
    path = write(tmp_path / "x.parquet", [1, 1, 2])
    note = f"Classes without images: 1 ('cat'). If its labels are counted from 1, write {path}#labels-from=1."
    assert open_data(path, "test").notes == (note,)
    manifest, _ = prepare(tmp_path, "parquet", path)
    assert manifest.notes == (
        "Classes without test images: 1 ('cat'). If its labels are counted from 1, prepare it again with "
        "--labels-from 1 --force.",
    )
    assert open_data(write(tmp_path / "y.parquet", [0, 2]), "test").notes == ("Classes without images: 1 ('dog').",)


def test_images_without_a_label_are_set_aside_as_told(tmp_path):
    for labels, kind in (
        ([0, -1, 2], pa.int64()),
        ([0, None, 2], pa.int64()),
        ([0.0, float("nan"), 2.0], pa.float64()),
    ):
        path = write(tmp_path / "x.parquet", labels, label_type=kind)
        with pytest.raises(
            UserError, match="has 1 images without a label: set them aside with `rayclip data prepare x "
        ):
            open_data(path, "test")
        root = tmp_path / f"{kind}{labels[1]}"
        manifest, data = prepare(root, "parquet", path)
        assert data.labels.tolist() == [0, 2] and manifest.splits["test"].rejected == 1


# Kinds of labels


@pytest.mark.parametrize(
    ("labels", "kind", "numbers"),
    [
        ([0.0, 2.0, 1.0], pa.float64(), [0, 2, 1]),
        ([0.0, 2.0, 1.0], pa.float32(), [0, 2, 1]),
        ([False, True, True], pa.bool_(), [0, 1, 1]),
        ([0, 2, 1], pa.uint8(), [0, 2, 1]),
        (["dog", "cat", "lemon"], pa.string(), [1, 0, 2]),
        (["dog", "cat", "lemon"], pa.large_string(), [1, 0, 2]),
        (["dog", "cat", "lemon"], pa.dictionary(pa.int32(), pa.string()), [1, 0, 2]),
        (["2", "0", "1"], pa.string(), [2, 0, 1]),
    ],
)
def test_numbers_truth_values_and_texts_are_labels(tmp_path, labels, kind, numbers):
    path = write(tmp_path / "x.parquet", labels, label_type=kind)
    data, (_, prepared) = open_data(path, "test"), prepare(tmp_path, "parquet", path)
    assert data.labels.tolist() == prepared.labels.tolist() == numbers
    assert data.class_names == prepared.class_names == NAMES and data.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "kind", "says"),
    [
        ([0.0, 0.5], pa.float64(), "name no class: 0.5 is no whole number"),
        ([0.0, float("inf")], pa.float64(), "name no class"),
        (["cat", "yak"], pa.string(), "'yak' is no number and no class name"),
        ([[0], [1]], pa.list_(pa.int64()), "no labels or captions"),
    ],
)
def test_other_labels_are_refused_in_a_sentence(tmp_path, labels, kind, says):
    path = write(tmp_path / "x.parquet", labels, label_type=kind)
    for opened in (lambda: open_data(path, "test"), lambda: prepare(tmp_path, "parquet", path)):
        with pytest.raises(UserError, match=says) as caught:
            opened()
        assert "\n" not in str(caught.value)


def test_texts_name_their_classes(tmp_path):
    columns = {"image": image_structs([picture(i) for i in range(3)]), "label": ["pear", "apple", "fig"]}
    path = write_parquet(tmp_path / "x.parquet", columns)
    data, (_, prepared) = open_data(str(path), "test"), prepare(tmp_path, "parquet", path)
    assert data.class_names == prepared.class_names == ("apple", "fig", "pear")
    assert data.labels.tolist() == prepared.labels.tolist() == [2, 0, 1]
    other = names_file(tmp_path, ["pear", "fig", "apple"])
    data, (_, prepared) = (
        open_data(f"{path}#names={other}", "test"),
        prepare(tmp_path, "parquet", path, "b", names=other),
    )
    assert data.class_names == prepared.class_names == ("pear", "fig", "apple")
    assert data.labels.tolist() == prepared.labels.tolist() == [0, 2, 1]
    assert data.fingerprint != open_data(str(path), "test").fingerprint  # other labels are other data


# Class names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\nsea lion\n\n", ("cat", "dog", "sea lion")),
        ("\ufeffcat\r\ndog\r\n", ("cat", "dog")),
        ("2 lemon\n0 cat\n1 dog\n", ("cat", "dog", "lemon")),
        ("1: cat\n2: dog\n", ("cat", "dog")),
        ("4 runner\n2 seater\n", ("4 runner", "2 seater")),
        ('["cat", "dog"]', ("cat", "dog")),
        ('{"1": "dog", "0": "cat"}', ("cat", "dog")),
        ('{"dog": 1, "cat": 0}', ("cat", "dog")),
    ],
)
def test_files_of_class_names(tmp_path, text, names):
    forms.put(tmp_path / "n", text)
    assert read_class_names(tmp_path / "n") == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat\n\ndog\n", "empty line, 2"),
        ("cat\n", "at least two"),
        ("", "at least two"),
        (b"\xff\xfe", "no UTF-8"),
        ('["cat", 3]', "no list of class names"),
        ('{"0": "cat", "2": "dog"}', "no list of class names"),
        ("[", "no readable JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, text, says):
    forms.put(tmp_path / "n", text)
    with pytest.raises(UserError, match=says):
        read_class_names(tmp_path / "n")
    with pytest.raises(UserError, match="no such file of class names"):
        read_class_names(tmp_path / "none")


def test_given_names_in_another_order_follow_the_labels():
    """A list in another order than the data's never shifts a label."""
    assert with_given_names(("fire_truck", "cat"), ("Cat", "fire truck"), "f") == (("fire truck", "Cat"), None)
    names, note = with_given_names(("0 a", "cat"), ("plane", "cat"), "f.txt")
    assert names == ("plane", "cat") and "by their order, by those of f.txt: '0 a' is 'plane'" in note


def test_a_prepared_set_and_digits_take_names_too(tmp_path):
    prepare(tmp_path, "parquet", write(tmp_path / "x.parquet", [0, 1, 2]))
    german = names_file(tmp_path, ["Katze", "Hund", "Zitrone"])
    data = open_data(f"{tmp_path}/root/mine#names={german}", "test")
    assert data.class_names == ("Katze", "Hund", "Zitrone") and "'cat' is 'Katze'" in data.notes[0]
    with pytest.raises(UserError, match="names 3 classes, but 'digits' has 10"):
        open_data(f"digits#names={german}", "test")


def test_classes_with_one_name_are_told(tmp_path):
    path = write(tmp_path / "x.parquet", [0, 1, 2], names=["fire_truck", "fire truck", "cat"])
    manifest, _ = prepare(tmp_path, "parquet", path)
    assert manifest.notes == (
        "Classes 0 and 1 ('fire_truck' and 'fire truck') are both called 'fire truck': nothing can tell them apart.",
    )


def test_numbered_class_folders_are_counted_not_spelled(tmp_path):
    for number in range(12):
        forms.put(tmp_path / f"f/{number}/a.png", png((number * 9, 0, 0)))
    manifest, data = prepare(tmp_path, "folder", tmp_path / "f")
    assert data.class_names[:4] == ("0", "1", "10", "11") and "The class names are numbers" in manifest.notes[0]
    letters = [f"class {chr(97 + i)}" for i in range(12)]
    manifest, data = prepare(tmp_path, "folder", tmp_path / "f", "named", names=names_file(tmp_path, letters))
    assert data.class_names == tuple(letters) and manifest.notes == ()
    red = [np.array(data.images([i])[0])[0, 0, 0] // 9 for i in range(12)]
    assert red == data.labels.tolist()


def test_a_webdataset_without_names_asks_for_them(tmp_path):
    make_wds(tmp_path / "w", {"test": 4})
    (tmp_path / "w/classnames.txt").unlink()
    with pytest.raises(UserError, match=r"has labels and no classnames\.txt: give --class-names FILE"):
        prepare(tmp_path, "webdataset", tmp_path / "w")
    assert prepare(tmp_path, "webdataset", tmp_path / "w", names=names_file(tmp_path))[1].labels.tolist() == [
        0,
        1,
        2,
        0,
    ]


def test_names_are_written_with_the_data(tmp_path):
    path = write(tmp_path / "x.parquet", [0, 1, 2], names=None)
    with pytest.raises(UserError, match="names no classes: give --class-names FILE"):
        open_data(path, "test")
    with pytest.raises(UserError, match="names no classes: give --class-names FILE"):
        prepare(tmp_path, "parquet", path)
    names = names_file(tmp_path)
    prepare(tmp_path, "parquet", path, names=names)
    assert json.loads((tmp_path / "root/mine" / MANIFEST).read_text())["class_names"] == list(NAMES)
    assert open_data(f"{path}#names={names}", "test").class_names == NAMES
    with pytest.raises(UserError, match=r"already prepared .* another source"):
        prepare(tmp_path, "parquet", path, names=names_file(tmp_path, ["a", "b", "c"], "other.txt"))

"""Folders of image files: class folders, ImageNet's forms, TinyImageNet."""

import json
import os
import shutil

import pytest

from data import forms
from rayclip.data import open_data
from rayclip.data.catalog import prepare_named
from rayclip.data.registry import DATASETS, curated_names
from rayclip.data.sources.folder import open_folder
from rayclip.data.spec import parse_spec
from rayclip.store import Store
from rayclip.types import UserError

ROW_OF = {
    "imagefolder": None,
    "imagenet_folder": DATASETS["imagenet"],
    "imagenet_kaggle": DATASETS["imagenet"],
    "tiny_imagenet_folder": DATASETS["tiny_imagenet"],
}
ALL = sorted(forms.FOLDERS)


@pytest.fixture(scope="module", params=ALL)
def form(request, tmp_path_factory):
    """A form's row, the folder with its miniature, and the records wanted; tests leave it as they found it."""
    folder = tmp_path_factory.mktemp(request.param) / "root"
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield ROW_OF[request.param], folder, forms.make(request.param, folder, monkeypatch)


def fill(root, *paths):
    return {path: forms.put(root / path, forms.jpeg()) for path in paths}


def listed(source, split):
    return [(r.path, r.label) for r in source.records(split)]


def test_records_are_the_files(form):
    row, folder, wanted = form
    source = open_folder(row, folder)
    assert source.splits() == {split: len(records) for split, records in wanted.items()}
    assert source.notes == ()
    for split, expected in wanted.items():
        records = list(source.records(split))
        assert [(r.label, r.read()) for r in records] == expected
        assert not any(r.problem for r in records) and len({r.path for r in records}) == len(records)
        assert [r.path for r in source.records(split, 3)] == [r.path for r in records[3:]]
        assert list(source.records(split, len(records))) == []


def test_the_description_names_the_records_not_the_place(form):
    row, folder, _ = form
    first = open_folder(row, folder).describe()
    assert first["kind"] == "folder" and str(folder) not in str(first)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    assert open_folder(row, elsewhere).describe() == first
    elsewhere.rename(folder)
    changed = next(folder.rglob(next(open_folder(row, folder).records("val")).path))
    before = changed.read_bytes()
    changed.write_bytes(b"other")
    assert open_folder(row, folder).describe() != first
    changed.write_bytes(before)


@pytest.mark.parametrize("row", [None, *(row for row in DATASETS.values() if row.classes)], ids=lambda r: r and r.name)
def test_a_missing_or_empty_folder_is_one_sentence(row, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError) as error:
            open_folder(row, folder)
        assert str(folder) in str(error.value) and str(error.value).endswith(".")


def test_captions_are_read_by_their_own_reader(tmp_path):
    with pytest.raises(UserError, match=r"holds no captions: none of dataset_flickr8k\.json"):
        open_folder(DATASETS["flickr8k"], tmp_path)


# Class folders


def test_class_folders_without_splits_are_the_test_split(tmp_path):
    files = fill(tmp_path, "cat/1.png", "ant/deep/er/2.JPG", "ant/1.webp", "train/1.jpg")
    source = open_folder(None, tmp_path)
    assert source.class_names == ("ant", "cat", "train")  # a class may be called 'train'
    assert listed(source, "test") == [("ant/1.webp", 0), ("ant/deep/er/2.JPG", 0), ("cat/1.png", 1), ("train/1.jpg", 2)]
    assert [r.read() for r in source.records("test")] == [files[r.path] for r in source.records("test")]


def test_labels_are_one_scheme_over_all_splits(tmp_path):
    fill(
        tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "validation/emu/1.jpg", "validation/dog/2.jpg", "extra/x/1.jpg"
    )
    source = open_folder(None, tmp_path)
    assert source.class_names == ("cat", "dog", "emu")
    assert listed(source, "train") == [("train/cat/1.jpg", 0), ("train/dog/1.jpg", 1)]
    assert listed(source, "val") == [("validation/dog/2.jpg", 1), ("validation/emu/1.jpg", 2)]
    assert source.notes == ("Not a split, and left out: extra.",)


def test_two_validation_folders_are_ambiguous(tmp_path):
    fill(tmp_path, "val/cat/1.jpg", "validation/cat/1.jpg")
    with pytest.raises(UserError, match="both val/ and validation/"):
        open_folder(None, tmp_path)


def test_folders_that_spell_one_name_are_one_class(tmp_path):
    fill(tmp_path, "train/tabby_cat/b.jpg", "train/Tabby cat/a.jpg", "train/zebra/1.jpg", "test/tabby  cat/c.jpg")
    source = open_folder(None, tmp_path)
    assert source.class_names == ("Tabby cat", "zebra")
    assert [label for _, label in listed(source, "train")] == [0, 0, 1] and listed(source, "test")[0][1] == 0
    assert (
        source.notes[0]
        == "Class folders 'Tabby cat' and 'tabby  cat' and 'tabby_cat' spell one name and are one class."
    )


def test_labels_sort_as_torchvision_sorts(tmp_path):
    fill(tmp_path, "Zebra/1.jpg", "ant/1.jpg", "_x/1.jpg")
    assert open_folder(None, tmp_path).class_names == ("Zebra", "_x", "ant")


def test_empty_class_folders_stay_classes(tmp_path):
    fill(tmp_path, "test/ant/1.jpg")
    (tmp_path / "test/bee").mkdir()
    source = open_folder(None, tmp_path)
    assert source.class_names == ("ant", "bee") and source.notes == ("1 class folder without images: bee.",)


def test_odd_files_are_records_and_other_files_are_noted(tmp_path):
    fill(tmp_path, "ant/good.jpg", "stray.jpg")
    for name, data in {
        "empty.png": "",
        "text.gif": "no image",
        "notes.txt": "x",
        "Thumbs.db": "x",
        ".hidden.jpg": "x",
    }.items():
        forms.put(tmp_path / "ant" / name, data)
    (tmp_path / "ant/dangling.tif").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "ant/pipe.jpg")  # reading it would never end
    forms.put(tmp_path / ".git/x.jpg", "x")
    forms.put(tmp_path / "__MACOSX/ant/x.jpg", "x")
    source = open_folder(None, tmp_path)
    records = {r.path: r for r in source.records("test")}
    assert list(records) == ["ant/dangling.tif", "ant/empty.png", "ant/good.jpg", "ant/text.gif"]
    assert records["ant/empty.png"].read() == b"" and records["ant/text.gif"].read() == b"no image"
    with pytest.raises(OSError):
        records["ant/dangling.tif"].read()
    assert source.notes == (
        "1 image file left out, being in the folder itself and no class folder.",
        "4 files that are no image left out (.db, .hidden.jpg, .jpg, .txt).",
    )


def test_images_beside_the_class_folders_are_noted(tmp_path):
    fill(tmp_path, "train/ant/1.jpg", "train/2.jpg", "train/3.jpg")
    assert open_folder(None, tmp_path).notes == ("2 image files left out, being in train and no class folder.",)


def test_symbolic_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "store", "1.jpg", "more/2.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/ant").symlink_to(tmp_path / "store")
    (tmp_path / "store/more/back").symlink_to(tmp_path / "store")
    fill(tmp_path / "set", "bee/1.jpg")
    source = open_folder(None, tmp_path / "set")
    assert listed(source, "test") == [("ant/1.jpg", 0), ("ant/more/2.jpg", 0), ("bee/1.jpg", 1)]


def test_names_that_are_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    source = open_folder(None, tmp_path)
    record = next(source.records("test"))
    assert source.class_names == ("caf�",) and record.path == "caf�/�.jpg" and record.read() == b"x"
    assert source.describe() == open_folder(None, tmp_path).describe()


# ImageNet


def test_label_keys_and_curated_names(form):
    row, folder, _ = form
    source = open_folder(row, folder)
    expected = {
        "imagefolder": ((), "banana"),
        "imagenet_folder": (forms.imagenet_wnids(), "n01440764"),
        "imagenet_kaggle": (forms.imagenet_wnids(), "word n01440764, synonym"),
        "tiny_imagenet_folder": (forms.curated("tiny_imagenet"), "word n02124075, synonym"),
    }[folder.parent.name.rstrip("0123456789")]
    assert (source.label_keys, source.class_names[0]) == (tuple(expected[0]), expected[1])
    if row:
        names = curated_names(row, source.class_names, "folder", source.label_keys)
        assert (names[0], names[-1]) == {1000: ("tench", "toilet paper"), 200: ("Egyptian cat", "African elephant")}[
            row.classes
        ]


def test_imagenet_wants_all_classes(tmp_path, monkeypatch):
    forms.make("imagenet_folder", tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "train")
    assert open_folder(DATASETS["imagenet"], tmp_path).splits() == {"val": 1000}  # one split is enough
    shutil.rmtree(tmp_path / "val" / forms.imagenet_wnids()[7])
    with pytest.raises(UserError, match=r"has 999 classes .* ImageNet-1k has 1,000"):
        open_folder(DATASETS["imagenet"], tmp_path)
    assert len(open_folder(None, tmp_path).class_names) == 999  # anybody's folder of images is welcome


def test_kaggle_list_and_files_that_disagree(tmp_path, monkeypatch):
    forms.make("imagenet_kaggle", tmp_path, monkeypatch)
    val = tmp_path / "ILSVRC/Data/CLS-LOC/val"
    (val / "ILSVRC2012_val_00000002.JPEG").unlink()
    forms.put(val / "ILSVRC2012_val_00009999.JPEG", forms.jpeg())
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_text(solution.read_text() + "ILSVRC2012_val_00000003,n99999999 1 2 3 4\nILSVRC2012_val_00000005,\n")
    wnid = forms.imagenet_wnids()[14]  # of the third image
    records = {r.path[-13:-5]: r for r in open_folder(DATASETS["imagenet"], tmp_path).records("val")}
    problems = {number: r.problem for number, r in records.items() if r.problem}
    assert problems == {
        "00000002": "LOC_val_solution.csv names it, but there is no such image file",
        "00000003": f"LOC_val_solution.csv gives it several classes: {wnid}, n99999999",
        "00000005": f"LOC_val_solution.csv gives it several classes: , {forms.imagenet_wnids()[28]}",
        "00009999": "LOC_val_solution.csv does not name it",
    }
    assert all(records[number].label is None for number in problems)
    fill(tmp_path / "ILSVRC/Data/CLS-LOC/train", "n99999999/1.JPEG")
    last = list(open_folder(DATASETS["imagenet"], tmp_path).records("train"))[-1]
    assert (last.label, last.problem) == (None, "no class of ImageNet: n99999999")
    solution.unlink()
    with pytest.raises(UserError, match=r"has no class folders: put Kaggle's LOC_val_solution.csv into"):
        open_folder(DATASETS["imagenet"], tmp_path)


# TinyImageNet


def test_tiny_imagenet_annotations_and_files_that_disagree(tmp_path, monkeypatch):
    forms.make("tiny_imagenet_folder", tmp_path, monkeypatch)
    val = tmp_path / "tiny-imagenet-200/val"
    (val / "images/val_7.JPEG").unlink()
    forms.put(val / "images/val_999.JPEG", forms.jpeg())
    lines = (val / "val_annotations.txt").read_text().splitlines()
    lines[8] = "val_8.JPEG\tn99999999\t0\t0\t1\t1"
    lines[9] = "val_9.JPEG"
    (val / "val_annotations.txt").write_text("\n".join(lines))
    records = list(open_folder(DATASETS["tiny_imagenet"], tmp_path).records("val"))
    assert len(records) == 301
    assert {r.path.rsplit("/", 1)[1]: r.problem for r in records if r.problem} == {
        "val_7.JPEG": "val_annotations.txt names it, but there is no such image file",
        "val_8.JPEG": "val_annotations.txt gives it an unknown class: n99999999",
        "val_9.JPEG": "val_annotations.txt gives it an unknown class: none",
        "val_999.JPEG": "val_annotations.txt does not name it",
    }
    assert [r.path for r in records] == sorted(r.path for r in records)


def tiny(root):
    """TinyImageNet with all its classes, hardly any image, and no annotations."""
    base = root / "tiny-imagenet-200"
    forms.put(base / "wnids.txt", "\n".join(forms.curated("tiny_imagenet")))
    fill(base / "train", "n04067472/images/n04067472_0.JPEG")
    return base


def test_tiny_imagenet_whose_val_was_sorted_into_class_folders(tmp_path):
    base = tiny(tmp_path)
    fill(base / "val", "n04067472/val_1.JPEG", "n02124075/images/val_2.JPEG", "n99999999/val_3.JPEG")
    for folder in (tmp_path, base):
        source = open_folder(DATASETS["tiny_imagenet"], folder)
        assert [label for _, label in listed(source, "val")] == [None, 0, 1]
        assert source.class_names[0] == "n02124075"  # there is no words.txt
        assert next(source.records("val")).problem == "wnids.txt does not have n99999999"


def test_tiny_imagenet_as_mere_class_folders_has_curated_names(tmp_path):
    fill(tmp_path, *(f"val/{wnid}/{wnid}.JPEG" for wnid in forms.curated("tiny_imagenet")))
    source = open_folder(DATASETS["tiny_imagenet"], tmp_path)
    names = curated_names(DATASETS["tiny_imagenet"], source.class_names, "folder", source.label_keys)
    assert names[0] == "goldfish" and source.class_names[0] == "n01443537"


def test_tiny_imagenet_wants_all_classes(tmp_path):
    wnids = tiny(tmp_path) / "wnids.txt"
    wnids.write_text("\n".join(wnids.read_text().split()[:150]))
    with pytest.raises(UserError, match="has 150 classes"):
        open_folder(DATASETS["tiny_imagenet"], tmp_path)


# CoOp's lists


def coop_list(root, **splits):
    """UCF101's form with a folder of images below the list's; each image is `(class, number)`."""
    names = [f"Class_{i}" for i in range(101)]
    listed = {"train": [], "val": [], "test": [[f"{n}/{n}.jpg", i, n] for i, n in enumerate(names)], **splits}
    for rows in listed.values():
        for file, _, _ in rows:
            forms.put(root / "UCF-101-midframes" / file, forms.jpeg())
    forms.put(root / "split_zhou_UCF101.json", json.dumps(listed).encode())
    return names


def test_coops_list_gives_splits_labels_and_names(tmp_path):
    names = coop_list(tmp_path, train=[["Class_7/other.jpg", 7, "Class_7"]], val=[["Class_9/third.jpg", 9, "Class_9"]])
    (tmp_path / "UCF-101-midframes/Class_3/Class_3.jpg").unlink()
    source = open_folder(DATASETS["ucf101"], tmp_path)
    assert source.splits() == {"train": 1, "val": 1, "test": 101}
    assert listed(source, "train") == [("UCF-101-midframes/Class_7/other.jpg", 7)]
    assert [r.problem for r in source.records("test") if r.problem] == [
        "split_zhou_UCF101.json names it, but it is not there"
    ]
    named = curated_names(DATASETS["ucf101"], source.class_names, "folder")
    assert named == tuple(name.replace("_", " ") for name in names)


def test_a_list_cannot_name_files_of_elsewhere(tmp_path):
    forms.put(tmp_path / "secret.jpg", forms.jpeg())
    coop_list(tmp_path / "root", val=[])
    file = tmp_path / "root/split_zhou_UCF101.json"
    listed = json.loads(file.read_text())
    listed["train"] = [["../../secret.jpg", 0, "Class_0"], [str(tmp_path / "secret.jpg"), 0, "Class_0"]]
    file.write_text(json.dumps(listed))
    records = list(open_folder(DATASETS["ucf101"], tmp_path / "root").records("train"))
    assert len(records) == 2 and all(r.problem and r.label is None for r in records)


@pytest.mark.parametrize("text", ["[", "{}", '{"train": [], "val": [], "test": [["a"]]}', None])
def test_a_damaged_or_missing_list_is_one_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / "split_zhou_UCF101.json").write_text(text)
    with pytest.raises(UserError, match=r"split_zhou"):
        open_folder(DATASETS["ucf101"], tmp_path)


def test_coops_split_is_a_data_set_of_its_own(tmp_path):
    names = [f"breed_{i}" for i in range(37)]
    listed = {split: [[f"{n}.jpg", i, n] for i, n in enumerate(names)] for split in ("train", "val", "test")}
    for name in names:
        forms.put(tmp_path / "pets/images" / f"{name}.jpg", forms.jpeg())
    forms.put(tmp_path / "pets/split_zhou_OxfordPets.json", json.dumps(listed).encode())
    root = Store(str(tmp_path / "root"))
    prepare_named("oxford_pets#coop", root, kind="folder", location=str(tmp_path / "pets"))
    assert parse_spec("oxford_pets#coop").place == "oxford_pets-coop"
    data = open_data(f"{tmp_path}/root/oxford_pets-coop", "test")
    assert len(data) == 37 and data.class_names[1] == "breed 1"

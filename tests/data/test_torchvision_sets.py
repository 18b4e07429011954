"""torchvision's data sets, each from a miniature of its published form."""

import io
import itertools
import shutil

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from data import forms
from rayclip.data.registry import DATASETS, curated_names
from rayclip.data.sources.torchvision_sets import TorchvisionSource
from rayclip.types import UserError

ALL = sorted(forms.TORCHVISION)


@pytest.fixture(scope="module", params=ALL)
def form(request, tmp_path_factory):
    """A row, the folder with its miniature, and the records wanted; tests leave it as they found it."""
    folder = tmp_path_factory.mktemp(request.param) / "root"
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield DATASETS[request.param], folder, forms.make(request.param, folder, monkeypatch)


def same_image(got: bytes, wanted: bytes, arrays: bool) -> bool:
    if not arrays:
        return got == wanted
    return np.array_equal(*(np.asarray(Image.open(io.BytesIO(data))) for data in (got, wanted)))


def test_every_row_that_torchvision_reads_has_a_miniature():
    assert set(forms.TORCHVISION) == {name for name, row in DATASETS.items() if row.torchvision}


def test_records_are_the_published_ones(form):
    row, folder, wanted = form
    source = TorchvisionSource(row, folder, download=False)
    assert source.splits() == {split: len(records) for split, records in wanted.items()}
    assert set(wanted) == set(row.splits) and source.notes == ()
    assert len(source.class_names) == row.classes
    for split, expected in wanted.items():
        records = list(source.records(split))
        assert [r.label for r in records] == [label for label, _ in expected]
        images = [r.read() for r in records]
        assert all(same_image(i, e, row.name in forms.ARRAYS) for i, (_, e) in zip(images, expected, strict=True))
        assert len({r.path for r in records}) == len(records) and not any(r.problem for r in records)
        assert not any(r.path.startswith("/") for r in records)
        start = len(expected) - 3  # the rest is the same records
        rest = list(source.records(split, start))
        assert [(r.path, r.label, r.read()) for r in rest] == [
            (r.path, r.label, image) for r, image in zip(records[start:], images[start:], strict=True)
        ]
        assert list(source.records(split, len(expected))) == []


def test_torchvision_itself_sees_the_same_images_and_labels(form):
    row, folder, _ = form
    if row.name == "sun397":
        pytest.skip("torchvision lists SUN397 in the file system's order")
    source = TorchvisionSource(row, folder, download=False)
    for split, arguments in row.torchvision.splits.items():
        theirs = getattr(torchvision.datasets, row.torchvision.cls)(folder, **arguments)
        for record, i in zip(source.records(split), range(20), strict=False):
            image, label = theirs[i]
            ours = Image.open(io.BytesIO(record.read())).convert("RGB")
            assert label == record.label and np.array_equal(np.asarray(image.convert("RGB")), np.asarray(ours))


def test_the_description_names_the_records_not_the_place(form):
    row, folder, _ = form
    first = TorchvisionSource(row, folder, download=False).describe()
    assert first["kind"] == "torchvision" and str(folder) not in str(first)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    try:
        assert TorchvisionSource(row, elsewhere, download=False).describe() == first
        one = TorchvisionSource(row, elsewhere, download=False, splits=[row.evaluated]).describe()
        assert (one == first) == (len(row.splits) == 1)
    finally:
        elsewhere.rename(folder)


def test_the_description_follows_a_changed_file(tmp_path, monkeypatch):
    forms.make("eurosat", tmp_path, monkeypatch)
    before = TorchvisionSource(DATASETS["eurosat"], tmp_path, download=False).describe()
    (tmp_path / "eurosat/2750/River/River_1.jpg").write_bytes(b"another")
    assert TorchvisionSource(DATASETS["eurosat"], tmp_path, download=False).describe() != before


def test_class_names_are_curated(form):
    row, folder, _ = form
    source = TorchvisionSource(row, folder, download=False, splits=[row.evaluated])
    names = curated_names(row, source.class_names, "torchvision", source.label_keys)
    first_and_last = {
        "cifar10": ("airplane", "truck"),
        "cifar100": ("apple", "worm"),
        "stl10": ("airplane", "truck"),
        "imagenet": ("tench", "toilet paper"),
        "caltech101": ("off-center face", "yin and yang symbol"),
        "caltech256": ("ak47", "clutter"),
        "oxford_pets": ("Abyssinian", "Yorkshire Terrier"),
        "flowers102": ("pink primrose", "blackberry lily"),
        "fgvc_aircraft": ("707-320", "Variant 95"),
        "stanford_cars": ("AM General Hummer SUV 2000", "Maker Model-193 Coupe 2012"),
        "food101": ("apple pie", "waffles"),
        "sun397": ("abbey", "zone 393 indoor"),
        "country211": ("Andorra", "Zimbabwe"),
        "eurosat": ("annual crop land", "lake or sea"),
        "dtd": ("banded", "zigzagged"),
        "pcam": ("lymph node", "lymph node containing metastatic tumor tissue"),
    }
    assert (names[0], names[-1]) == first_and_last[row.name] and len(names) == row.classes


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("there", [False, True])
def test_a_missing_set_is_one_sentence(name, there, tmp_path):
    row, folder = DATASETS[name], tmp_path / "sets"
    if there:
        folder.mkdir()
    with pytest.raises(UserError) as error:
        TorchvisionSource(row, folder, download=False)
    text = str(error.value)
    assert str(folder) in text and row.torchvision.needs in text and text.endswith(".") and "\n" not in text
    assert ("--source hub" in text) == (row.hub is not None)
    assert folder.exists() == there


def test_a_damaged_batch_is_one_sentence(tmp_path, monkeypatch):
    forms.make("cifar10", tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"not found or corrupted.*--source hub"):
        TorchvisionSource(DATASETS["cifar10"], tmp_path, download=False)


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torchvision.datasets.EuroSAT, "download", lambda self: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(UserError, match=r"could not fetch EuroSAT .*no route.*--source hub"):
        TorchvisionSource(DATASETS["eurosat"], tmp_path, download=True)


def test_download_takes_what_is_there(tmp_path, monkeypatch):
    forms.make("dtd", tmp_path, monkeypatch)
    assert TorchvisionSource(DATASETS["dtd"], tmp_path, download=True).splits() == {"train": 47, "val": 47, "test": 47}


def test_one_split_of_imagenet_is_enough_where_the_other_is_not_there(tmp_path, monkeypatch):
    forms.make("imagenet", tmp_path, monkeypatch)
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    source = TorchvisionSource(DATASETS["imagenet"], tmp_path, download=False)
    assert source.splits() == {"val": 1000} and source.notes == ("There is no train split in the folder.",)
    assert source.label_keys[0] == "n01440764" and source.class_names[0] == "word n01440764, synonym"
    with pytest.raises(UserError, match="no split 'train': it has val"):
        source.records("train")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar"):
        TorchvisionSource(DATASETS["imagenet"], tmp_path, download=False, splits=["train", "val"])


def test_a_missing_image_is_a_record_that_cannot_be_read(tmp_path, monkeypatch):
    wanted = forms.make("oxford_pets", tmp_path, monkeypatch)["test"]
    next((tmp_path / "oxford-iiit-pet/images").glob("beagle_101.jpg")).unlink()
    records = list(TorchvisionSource(DATASETS["oxford_pets"], tmp_path, download=False).records("test"))
    assert len(records) == len(wanted)
    with pytest.raises(OSError):
        records[4].read()


def test_splits_of_different_classes_are_refused(tmp_path, monkeypatch):
    forms.make("dtd", tmp_path, monkeypatch)
    lines = (tmp_path / "dtd/dtd/labels/test1.txt").read_text().splitlines()
    (tmp_path / "dtd/dtd/labels/test1.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match="name different classes"):
        TorchvisionSource(DATASETS["dtd"], tmp_path, download=False)


def test_a_half_copied_pcam_is_refused(tmp_path, monkeypatch):
    forms.make("pcam", tmp_path, monkeypatch)
    whole = tmp_path / "pcam/camelyonpatch_level_2_split_test_x.h5"
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(UserError, match="fetch both again"):
        TorchvisionSource(DATASETS["pcam"], tmp_path, download=False)


def test_what_torchvision_does_not_have(tmp_path):
    with pytest.raises(UserError, match="torchvision has no data set 'tiny_imagenet': take --source"):
        TorchvisionSource(DATASETS["tiny_imagenet"], tmp_path, download=False)
    with pytest.raises(UserError, match="no split 'val': it has train, test"):
        TorchvisionSource(DATASETS["cifar10"], tmp_path, download=False, splits=["val"])


def test_a_late_start_reads_no_image_before_it(tmp_path, monkeypatch):
    forms.make("food101", tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "food-101/images")
    (tmp_path / "food-101/images").mkdir()
    source = TorchvisionSource(DATASETS["food101"], tmp_path, download=False)
    assert len(list(itertools.islice(source.records("test", 90), 5))) == 5

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rayclip.data import batch_pixels, few_shot, open_data
from rayclip.data.digits import CLASS_NAMES
from rayclip.types import UserError

NAMES = ["cat", "dog", "lemon"]


def png(colour, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def write(path, labels, images=None, names=NAMES, column="image", label_type=pa.int64(), row_group=4):
    images = images or [png((i, 2 * i % 256, 7)) for i in range(len(labels))]
    struct = pa.array(
        [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    metadata = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({column: struct, "label": pa.array(labels, label_type)})
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=row_group)
    return str(path)


@pytest.fixture
def parquet(tmp_path):
    return write(tmp_path / "mine.parquet", [0, 1, 2] * 5)


def test_digits_have_a_fixed_stratified_split():
    train, test = open_data("digits", "train"), open_data("digits", "test")
    assert (len(train), len(test)) == (1352, 445)
    assert set(train.ids.tolist()).isdisjoint(test.ids.tolist()) and len({*train.ids, *test.ids}) == 1797
    assert min(np.bincount(test.labels)) >= 43
    assert train.class_names == CLASS_NAMES
    pixels = batch_pixels(test, [0, 444], "native", 8)
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.uint8 and pixels.max() == 255


def test_any_parquet_in_the_hugging_face_layout_is_read(parquet):
    data = open_data(parquet, "test")
    assert (data.name, data.class_names, len(data)) == ("mine", tuple(NAMES), 15)
    assert data.labels.tolist() == [0, 1, 2] * 5
    pixels = batch_pixels(data, [14, 3, 0], "native", 8)  # across row groups, in the order asked for
    assert pixels[:, 0, 0, 0].tolist() == [14, 3, 0]


def test_the_datasets_library_is_not_needed_to_agree_on_files(parquet, tmp_path):
    same = write(tmp_path / "other.parquet", [0, 1, 2] * 5)
    changed = write(tmp_path / "changed.parquet", [0, 1, 2] * 4 + [0, 1, 1])
    prints = [open_data(p, "test").fingerprint for p in (parquet, same, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_a_held_out_fifth_is_fixed_and_stratified(parquet):
    train, test = (open_data(f"{parquet}#holdout", s) for s in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [4, 4, 4] and np.bincount(test.labels).tolist() == [1, 1, 1]
    assert set(train.ids.tolist()).isdisjoint(test.ids.tolist())


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train-00000-of-00002.parquet", [0, 1, 2])
    write(folder / "train-00001-of-00002.parquet", [2, 1])
    write(folder / "val-00000.parquet", [1])
    assert open_data(str(folder), "train").labels.tolist() == [0, 1, 2, 2, 1]
    assert open_data(str(folder), "test").labels.tolist() == [1]


def test_prepared_names_are_found_below_the_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"'imagenet' is not prepared .*rayclip data prepare imagenet"):
        open_data("imagenet", "train")
    (tmp_path / "imagenet").mkdir()
    write(tmp_path / "imagenet" / "train-0.parquet", [0, 1, 2])
    assert open_data("imagenet", "train").name == "imagenet"
    with pytest.raises(UserError, match=r"holds no test images, only train: write .*imagenet#holdout"):
        open_data("imagenet", "test")
    assert len(open_data("imagenet#holdout", "train")) == 3
    with pytest.raises(UserError, match="no class of 'imagenet' has five images"):
        open_data("imagenet#holdout", "test")


def test_draws_are_per_class_nested_and_seeded(parquet):
    data = open_data(parquet, "train")
    one, three = few_shot(data, 1, 0), few_shot(data, 3, 0)
    assert np.bincount(one.labels).tolist() == [1, 1, 1] and np.bincount(three.labels).tolist() == [3, 3, 3]
    assert set(one.ids) <= set(three.ids)
    assert few_shot(data, 3, 0).ids.tolist() == three.ids.tolist() != few_shot(data, 3, 1).ids.tolist()
    assert few_shot(data, None, 0) is data
    with pytest.raises(UserError, match=r"--shots 6 is more than class 'cat' of 'mine' has \(5 images\)"):
        few_shot(data, 6, 0)


def test_images_of_one_size_are_native_and_others_need_the_models_size(tmp_path):
    mixed = open_data(write(tmp_path / "m.parquet", [0, 1], [png("red", (20, 10)), png("blue", (10, 10))]), "test")
    with pytest.raises(UserError, match="--resolution model"):
        batch_pixels(mixed, [0, 1], "native", 8)
    assert batch_pixels(mixed, [0, 1], "model", 8).shape == (2, 3, 8, 8)


def test_the_papers_resize_rule():
    """Small squares to the input size; others shorter side to 8/7 of it (256 for 224), then the centre."""
    from rayclip.data.images import to_model_size

    stripes = Image.new("RGB", (448, 256))
    stripes.paste("white", (112, 0, 336, 256))
    out = to_model_size(stripes, 224)
    assert out.size == (224, 224) and out.getpixel((5, 100)) == (255, 255, 255)
    assert to_model_size(Image.new("RGB", (32, 32)), 224).size == (224, 224)
    for rule, left in (("crop", 16), ("clip", 0)):  # which part of a square is seen
        ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
        assert abs(np.asarray(to_model_size(ramp, 224, rule))[0, 0, 0] - left) <= 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p, "no such data file"),
        (lambda p: (p.write_text("not parquet"), p)[1], "no readable Parquet"),
        (lambda p: write(p, ["a", "b"], label_type=pa.string()), "'a' is no number and no class name"),
        (lambda p: write(p, [0, 1], names=None), "names no classes: give --class-names FILE"),
        (lambda p: write(p, [0, 3]), r"labels? 3 \(4 classes\), but 3 class names, which are labels 0 to 2"),
        (lambda p: write(p, [0, 5]), "has the label 5, but 3 class names, which are labels 0 to 2"),
        (lambda p: write(p, []), "holds no rows"),
        (lambda p: write(p, [0], names=["cat"]), "at least two classes"),
    ],
)
def test_bad_files_are_explained(tmp_path, make, match):
    with pytest.raises(UserError, match=match):
        open_data(str(make(tmp_path / "x.parquet")), "test")


def test_an_unreadable_image_names_its_row(tmp_path):
    data = open_data(write(tmp_path / "x.parquet", [0, 1], [png("red"), b"no image"]), "test")
    with pytest.raises(UserError, match="row 1 of 'x'"):
        batch_pixels(data, [1], "native", 8)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(UserError, match=r"no data set or file 'cifar11'.*cifar10"):
        open_data("cifar11", "test")


def test_real_images(shared):
    for name, classes in (("cifar10-test", 10), ("tiny_imagenet-val", 200)):
        data = open_data(str(shared / f"data/{name}.parquet"), "test")
        assert (len(data), len(data.class_names)) == (5000, classes)
        assert batch_pixels(data, [0, 2500, 4999], "native", 32).float().std() > 20


def test_validation_images_are_of_the_training_split_and_nobody_trains_on_them():
    whole, train = open_data("digits", "train"), open_data("digits#validation", "train")
    kept = open_data("digits#validation", "test")
    assert not set(train.ids) & set(kept.ids) and set(train.ids) | set(kept.ids) == set(whole.ids)
    assert not set(kept.ids) & set(open_data("digits", "test").ids)
    assert len(kept) == sum((whole.labels == label).sum() // 5 for label in range(10))
    assert len({whole.fingerprint, train.fingerprint, kept.fingerprint}) == 3

"""The rows of the registry and the curated class names."""

import json
from importlib import resources

import pytest

from rayclip.data.registry import DATASETS, MMCOA_15, ZERO_SHOT_16, clean, curated_names, find
from rayclip.types import UserError

NAMES = json.loads(resources.files("rayclip.data").joinpath("classnames.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", DATASETS.values(), ids=lambda row: row.name)
def test_every_row_is_complete(row):
    assert DATASETS[row.name] is row and row.title and row.licence.endswith(".") and len(row.citation) > 20
    assert row.evaluated in row.splits and all(count > 0 for count in row.splits.values())
    assert set(row.splits) <= {"train", "val", "test"}
    listed = row.folder == "coop"  # CoOp's list is what is downloaded
    places = {"torchvision": row.torchvision, "hub": row.hub, "bundled": row.name == "digits", "folder": listed}
    assert places[row.taken_from]
    if row.torchvision:
        assert set(row.torchvision.splits) == set(row.splits) and row.torchvision.needs
    if row.hub:
        assert row.evaluated in row.hub.splits and set(row.hub.splits) <= {*row.splits, *row.hub.counts}
        smaller = {s for s in row.splits if s in row.hub.counts or s not in row.hub.splits}
        assert not smaller or row.hub.note
    assert (row.folder == "captions") == (row.classes == 0)


@pytest.mark.parametrize("row", [row for row in DATASETS.values() if row.curated], ids=lambda row: row.name)
def test_curated_lists_have_a_name_for_every_class(row):
    names = NAMES[row.curated]
    assert len(names) == row.classes
    spelled = list(names.values()) if isinstance(names, dict) else names
    twice = {name for name in spelled if spelled.count(name) > 1}
    assert twice == ({"missile", "sunglasses"} if row.curated == "imagenet" else set())
    assert all(name == " ".join(name.split()) and "_" not in name for name in spelled)


def test_every_list_is_used():
    assert set(NAMES) == {row.curated for row in DATASETS.values() if row.curated} | {"caltech101_vtab"}
    assert len(NAMES["caltech101_vtab"]) == DATASETS["caltech101"].hub.classes == 102


def test_published_orders():
    for key in (
        "caltech101",
        "country211",
        "eurosat",
        "imagenet",
        "imagenet_a",
        "imagenet_r",
    ):  # keyed by folder names, which torchvision sorts
        assert list(NAMES[key]) == sorted(NAMES[key])
    for key in ("cifar100", "dtd", "food101", "stl10"):
        assert NAMES[key] == sorted(NAMES[key])
    assert sorted(NAMES["caltech101"].values()) == sorted(set(NAMES["caltech101_vtab"]) - {"background"})
    for key in ("imagenet_a", "imagenet_r"):
        assert NAMES[key].items() < NAMES["imagenet"].items()
    assert list(NAMES["tiny_imagenet"])[:2] == ["n02124075", "n04067472"]


def test_the_papers_sets():
    assert (
        len(set(MMCOA_15)) == 15 and len(set(ZERO_SHOT_16)) == 16 and set(MMCOA_15) | set(ZERO_SHOT_16) <= set(DATASETS)
    )
    assert set(ZERO_SHOT_16) - set(MMCOA_15) == {"stanford_cars", "pcam"}
    assert set(MMCOA_15) - set(ZERO_SHOT_16) == {"tiny_imagenet"}


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("CIFAR-10", "cifar10"),
        ("imagnet", "imagenet"),
        ("TinyImageNet", "tiny_imagenet"),
        ("cars", "stanford_cars"),
        ("coco", "mscoco_captions"),
        ("flowers", "flowers102"),
        ("pets", "oxford_pets"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(asked, first):
    with pytest.raises(UserError, match=f"no data set '{asked}': did you mean {first}"):
        find(asked)


def test_lookup():
    assert find("dtd") is DATASETS["dtd"]
    with pytest.raises(UserError, match=r"there are cifar10, cifar100"):
        find("qqqqqq")


@pytest.mark.parametrize("row", DATASETS.values(), ids=lambda row: row.name)
def test_another_number_of_classes_is_refused(row):
    if row.classes == 0:
        assert curated_names(row, (), "hub") == ()
        return
    with pytest.raises(UserError, match=f"{row.title} has {row.classes} classes, but the source holds 3"):
        curated_names(row, ("a", "b", "c"), "torchvision")


def test_names_follow_the_labels_of_the_source_not_the_list():
    row = DATASETS["tiny_imagenet"]
    by_wnid = sorted(NAMES["tiny_imagenet"])  # the hub's label order
    names = curated_names(row, by_wnid, "hub")
    assert names[0] == "goldfish" and names[by_wnid.index("n02124075")] == "Egyptian cat"
    pets = sorted(name.replace(" ", "_").lower() for name in NAMES["oxford_pets"][::-1])
    assert curated_names(DATASETS["oxford_pets"], pets[::-1], "folder")[-1] == "Abyssinian"
    cifar = curated_names(DATASETS["cifar10"], NAMES["cifar10"][::-1], "hub")
    assert cifar == tuple(NAMES["cifar10"][::-1])


def test_imagenets_relatives_are_named_by_wordnet_id_or_by_the_number_of_the_class():
    known = NAMES["imagenet"]
    sketch = curated_names(DATASETS["imagenet_sketch"], sorted(known), "folder")
    assert sketch == tuple(known.values())
    numbers = sorted(str(i) for i in range(1000))  # as folders are listed: '0', '1', '10', '100'
    assert curated_names(DATASETS["imagenet_v2"], numbers, "folder")[2] == list(known.values())[10]
    assert curated_names(DATASETS["imagenet_r"], sorted(NAMES["imagenet_r"]), "folder")[0] == known["n01443537"]


def test_a_folder_whose_order_is_unknown_keeps_its_own_names():
    numbers = sorted(str(i) for i in range(1, 103))  # '1', '10', '100': not the order of the published labels
    assert curated_names(DATASETS["flowers102"], numbers, "folder") == tuple(numbers)
    assert curated_names(DATASETS["flowers102"], numbers, "torchvision")[1] == "hard-leaved pocket orchid"
    other = [f"x{i}" for i in range(200)]  # Parquet on the hub has an order of its own
    assert curated_names(DATASETS["tiny_imagenet"], other, "hub") == tuple(other)
    assert curated_names(DATASETS["tiny_imagenet"], other, "folder", label_keys=other) == tuple(other)
    countries = [f"x{i}" for i in range(211)]
    assert curated_names(DATASETS["country211"], countries, "torchvision")[0] == "Andorra"
    assert curated_names(DATASETS["country211"], countries, "folder") == tuple(countries)


def test_the_hubs_caltech_has_a_background():
    names = curated_names(DATASETS["caltech101"], [str(i) for i in range(102)], "hub")
    assert names[4] == "background" and len(names) == 102


def test_raw_names_are_cleaned():
    assert clean(DATASETS["caltech256"], "251.airplanes-101") == "airplanes"
    assert clean(DATASETS["caltech256"], "002.american-flag") == "american flag"
    assert clean(DATASETS["sun397"], "apartment_building/outdoor") == "apartment building outdoor"
    assert clean(DATASETS["fgvc_aircraft"], "F-16A/B") == "F-16A/B"

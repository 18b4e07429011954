"""The papers' data sets, one declarative row each.

Split sizes are those published by the data sets' authors; `evaluated` is the split that SAFT, TTC and MMCoA report on.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from rayclip.types import UserError

Resize = Literal["square", "crop"]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set's repository on the Hugging Face hub.

    Attributes:
        repo: data set id.
        form: CLIP_benchmark's WebDataset form, or Parquet files.
        splits: our split names -> the repository's.
        counts: sizes of the splits that differ from the published ones.
        classes, curated: given if they differ from the row's.
        note: how it differs from what the papers evaluate, one sentence.
    """

    repo: str
    form: Literal["webdataset", "parquet"]
    splits: Mapping[str, str]
    counts: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    curated: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """torchvision's class for a data set.

    Attributes:
        cls: name in `torchvision.datasets`.
        splits: our split names -> keyword arguments of the class.
        needs: the files that the class expects in its folder, for messages.
        download: whether the class can download the files itself.
    """

    cls: str
    splits: Mapping[str, Mapping[str, Any]]
    needs: str
    download: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One data set.

    Attributes:
        name: on the command line and in tables.
        title: for people.
        splits: published number of images in each split.
        evaluated: the split the papers report on.
        classes: number of classes; 0 for image-caption data.
        curated: key of `classnames.json`; None if CLIP's names are the cleaned raw names.
        cleaning: regular expressions and their replacements, applied in order when names are cleaned.
        resize: at resolution `model`: `square` to the input size, or `crop` (shorter side, then the centre).
        licence: the known terms, in a few words.
        citation: authors, year, title, venue.
        torchvision, hub: sources to take it from.
        folder: published folder form that `--source folder` reads.
        default: the source used if none is named.
        note: a remark for users, one sentence.
    """

    name: str
    title: str
    splits: Mapping[str, int]
    evaluated: str
    classes: int
    resize: Resize
    licence: str
    citation: str
    curated: str | None = None
    cleaning: tuple[tuple[str, str], ...] = (("_", " "),)
    torchvision: Torchvision | None = None
    hub: Hub | None = None
    folder: Literal["imagefolder", "imagenet", "tiny_imagenet", "captions"] = "imagefolder"
    default: Literal["torchvision", "hub", "bundled"] = "hub"
    note: str = ""


def find(name: str) -> Row:
    """Return the row of that name.

    Raises:
        UserError: unknown name; the message suggests the nearest ones.
    """
    if name in ROWS:
        return ROWS[name]
    asked = _plain(name)
    by_plain = {_plain(text): row.name for row in ROWS.values() for text in (row.name, row.title)}
    near = [by_plain[asked]] if asked in by_plain else []
    near += [row for text, row in by_plain.items() if len(asked) > 2 and (asked in text or text in asked)]
    near += [by_plain[match] for match in difflib.get_close_matches(asked, by_plain, n=3, cutoff=0.6)]
    nearest = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(ROWS)}."
    raise UserError(f"no data set '{name}': {hint}")


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def _wds(name: str, *splits: str, **changes: Any) -> Hub:
    """Return CLIP_benchmark's repository of a data set, whose splits have our names."""
    mapping = {split: split for split in splits or ("train", "test")}
    return Hub(**{"repo": f"clip-benchmark/wds_{name}", "form": "webdataset", "splits": mapping, **changes})


_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_CIFAR_SPLITS = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: dict[str, dict[str, Any]] = {"test": {}}

_VTAB_TRAIN = "Its train split is VTAB's, a part of the published one; the test split is the published one."
_NO_VAL = "It has no val split."

# The 16 zero-shot targets of SAFT and TTC, then data sets for training, the bundled one, and those for retrieval.
_ALL = (
    Row(
        name="cifar10",
        title="CIFAR-10",
        splits={"train": 50_000, "test": 10_000},
        evaluated="test",
        classes=10,
        resize="square",
        licence="Unknown: the authors state none.",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images, University of Toronto",
        curated="cifar10",
        torchvision=Torchvision(cls="CIFAR10", splits=_CIFAR_SPLITS, needs="cifar-10-batches-py/"),
        hub=_wds("vtab-cifar10", counts={"train": 45_000}, note=_VTAB_TRAIN),
        default="torchvision",
    ),
    Row(
        name="cifar100",
        title="CIFAR-100",
        splits={"train": 50_000, "test": 10_000},
        evaluated="test",
        classes=100,
        resize="square",
        licence="Unknown: the authors state none.",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images, University of Toronto",
        curated="cifar100",
        torchvision=Torchvision(cls="CIFAR100", splits=_CIFAR_SPLITS, needs="cifar-100-python/"),
        hub=_wds("vtab-cifar100", counts={"train": 45_000}, note=_VTAB_TRAIN),
        default="torchvision",
    ),
    Row(
        name="stl10",
        title="STL-10",
        splits={"train": 5_000, "test": 8_000},
        evaluated="test",
        classes=10,
        resize="square",
        licence="Unknown: the authors state none; the images are ImageNet's (non-commercial research).",
        citation="Coates, Ng & Lee 2011, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, "
        "AISTATS",
        curated="stl10",
        torchvision=Torchvision(cls="STL10", splits=_TRAIN_TEST, needs="stl10_binary/"),
        hub=_wds("stl10"),
        default="torchvision",
    ),
    Row(
        name="imagenet",
        title="ImageNet-1k",
        splits={"train": 1_281_167, "val": 50_000},
        evaluated="val",
        classes=1_000,
        resize="crop",
        licence="Non-commercial research and education only (ImageNet's terms of access).",
        citation="Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge, IJCV",
        curated="imagenet",
        torchvision=Torchvision(
            cls="ImageNet",
            splits={"train": {"split": "train"}, "val": {"split": "val"}},
            needs="ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, "
            "or meta.bin with train/ or val/",
            download=False,
        ),
        hub=_wds("imagenet1k", splits={"train": "train", "val": "test"}),
        folder="imagenet",
    ),
    Row(
        name="caltech101",
        title="Caltech-101",
        splits={"test": 8_677},
        evaluated="test",
        classes=101,
        resize="crop",
        licence="CC BY 4.0 (CaltechDATA).",
        citation="Fei-Fei, Fergus & Perona 2004, Learning Generative Visual Models from Few Training Examples, CVPR-W",
        curated="caltech101",
        torchvision=Torchvision(cls="Caltech101", splits=_WHOLE, needs="caltech101/101_ObjectCategories/"),
        hub=_wds(
            "vtab-caltech101",
            counts={"train": 2_754, "test": 6_085},
            classes=102,
            curated="caltech101_vtab",
            note="This is VTAB's protocol, 6,085 test images of 102 classes with the background; "
            "the papers evaluate all 8,677 images of the 101 classes without it.",
        ),
        default="torchvision",
        note="There is no published split: all images of the 101 classes without the background are the test split.",
    ),
    Row(
        name="caltech256",
        title="Caltech-256",
        splits={"test": 30_607},
        evaluated="test",
        classes=257,
        resize="crop",
        licence="CC BY 4.0 (CaltechDATA).",
        citation="Griffin, Holub & Perona 2007, Caltech-256 Object Category Dataset, Caltech",
        # 001.ak47, 251.airplanes-101, 003.backpack, 008.bathtub
        cleaning=((r"^\d{3}\.", ""), ("-101$", ""), ("[-_]", " ")),
        torchvision=Torchvision(cls="Caltech256", splits=_WHOLE, needs="caltech256/256_ObjectCategories/"),
        default="torchvision",
        note="There is no published split: all images, clutter included, are the test split.",
    ),
    Row(
        name="oxford_pets",
        title="Oxford-IIIT Pets",
        splits={"train": 3_680, "test": 3_669},
        evaluated="test",
        classes=37,
        resize="crop",
        licence="CC BY-SA 4.0.",
        citation="Parkhi, Vedaldi, Zisserman & Jawahar 2012, Cats and Dogs, CVPR",
        curated="oxford_pets",
        torchvision=Torchvision(
            cls="OxfordIIITPet",
            splits={"train": {"split": "trainval"}, "test": {"split": "test"}},
            needs="oxford-iiit-pet/images/ and oxford-iiit-pet/annotations/",
        ),
        hub=_wds("vtab-pets", counts={"train": 2_944}, note=_VTAB_TRAIN),
        default="torchvision",
        note="The train split is the published trainval.",
    ),
    Row(
        name="flowers102",
        title="Flowers-102",
        splits={"train": 1_020, "val": 1_020, "test": 6_149},
        evaluated="test",
        classes=102,
        resize="crop",
        licence="Unknown: the authors state none.",
        citation="Nilsback & Zisserman 2008, Automated Flower Classification over a Large Number of Classes, ICVGIP",
        curated="flowers102",
        torchvision=Torchvision(
            cls="Flowers102",
            splits=_TRAIN_VAL_TEST,
            needs="flowers-102/jpg/, flowers-102/imagelabels.mat and flowers-102/setid.mat",
        ),
        hub=_wds("vtab-flowers", note=_NO_VAL),
        default="torchvision",
    ),
    Row(
        name="fgvc_aircraft",
        title="FGVC-Aircraft",
        splits={"train": 3_334, "val": 3_333, "test": 3_333},
        evaluated="test",
        classes=100,
        resize="crop",
        licence="Non-commercial research only.",
        citation="Maji, Rahtu, Kannala, Blaschko & Vedaldi 2013, Fine-Grained Visual Classification of Aircraft, "
        "arXiv 1306.5151",
        torchvision=Torchvision(cls="FGVCAircraft", splits=_TRAIN_VAL_TEST, needs="fgvc-aircraft-2013b/data/"),
        hub=_wds("fgvc_aircraft", note=_NO_VAL),
        default="torchvision",
        note="The classes are the 100 variants.",
    ),
    Row(
        name="stanford_cars",
        title="Stanford Cars",
        splits={"train": 8_144, "test": 8_041},
        evaluated="test",
        classes=196,
        resize="crop",
        licence="Non-commercial research only.",
        citation="Krause, Stark, Deng & Fei-Fei 2013, 3D Object Representations for Fine-Grained Categorization, 3dRR",
        torchvision=Torchvision(
            cls="StanfordCars",
            splits=_TRAIN_TEST,
            needs="stanford_cars/devkit/, stanford_cars/cars_train/, stanford_cars/cars_test/ and "
            "stanford_cars/cars_test_annos_withlabels.mat",
            download=False,
        ),
        hub=_wds("cars"),
    ),
    Row(
        name="food101",
        title="Food-101",
        splits={"train": 75_750, "test": 25_250},
        evaluated="test",
        classes=101,
        resize="crop",
        licence="The images are Foodspotting's, not the authors': scientific fair use only.",
        citation="Bossard, Guillaumin & Van Gool 2014, Food-101: Mining Discriminative Components with Random Forests, "
        "ECCV",
        curated="food101",
        torchvision=Torchvision(cls="Food101", splits=_TRAIN_TEST, needs="food-101/images/ and food-101/meta/"),
        hub=Hub(repo="ethz/food101", form="parquet", splits={"train": "train", "test": "validation"}),
        default="torchvision",
    ),
    Row(
        name="sun397",
        title="SUN397",
        splits={"test": 108_754},
        evaluated="test",
        classes=397,
        resize="crop",
        licence="Unknown: the authors state none; the images were found on the web (research use).",
        citation="Xiao, Hays, Ehinger, Oliva & Torralba 2010, SUN Database: Large-Scale Scene Recognition from Abbey "
        "to Zoo, CVPR",
        cleaning=(("[_/]", " "),),  # apartment_building/outdoor
        torchvision=Torchvision(cls="SUN397", splits=_WHOLE, needs="SUN397/ with ClassName.txt"),
        hub=_wds("sun397", "test"),
        note="All images are the test split, as in the papers; the authors' ten partitions are not used.",
    ),
    Row(
        name="country211",
        title="Country211",
        splits={"train": 31_650, "val": 10_550, "test": 21_100},
        evaluated="test",
        classes=211,
        resize="crop",
        licence="Each image has a Creative Commons licence of its own (YFCC100M).",
        citation="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, ICML",
        curated="country211",
        torchvision=Torchvision(
            cls="Country211",
            splits={"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
            needs="country211/",
        ),
        hub=_wds("country211", note=_NO_VAL),
        default="torchvision",
    ),
    Row(
        name="eurosat",
        title="EuroSAT",
        splits={"test": 27_000},
        evaluated="test",
        classes=10,
        resize="square",
        licence="MIT.",
        citation="Helber, Bischke, Dengel & Borth 2019, EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land "
        "Use and Land Cover Classification, IEEE JSTARS",
        curated="eurosat",
        torchvision=Torchvision(cls="EuroSAT", splits=_WHOLE, needs="eurosat/2750/"),
        hub=_wds(
            "vtab-eurosat",
            counts={"train": 16_200, "test": 5_400},
            note="This is VTAB's protocol, 5,400 test images; the papers evaluate all 27,000.",
        ),
        default="torchvision",
        note="There is no published split: all images are the test split.",
    ),
    Row(
        name="dtd",
        title="DTD",
        splits={"train": 1_880, "val": 1_880, "test": 1_880},
        evaluated="test",
        classes=47,
        resize="crop",
        licence="Research use only.",
        citation="Cimpoi, Maji, Kokkinos, Mohamed & Vedaldi 2014, Describing Textures in the Wild, CVPR",
        curated="dtd",
        torchvision=Torchvision(
            cls="DTD",
            splits={split: {**arguments, "partition": 1} for split, arguments in _TRAIN_VAL_TEST.items()},
            needs="dtd/dtd/images/ and dtd/dtd/labels/",
        ),
        hub=_wds("vtab-dtd", note=_NO_VAL),
        default="torchvision",
        note="The splits are the first of ten published partitions.",
    ),
    Row(
        name="pcam",
        title="PatchCamelyon",
        splits={"train": 262_144, "val": 32_768, "test": 32_768},
        evaluated="test",
        classes=2,
        resize="square",
        licence="CC0.",
        citation="Veeling, Linmans, Winkens, Cohen & Welling 2018, Rotation Equivariant CNNs for Digital Pathology, "
        "MICCAI",
        curated="pcam",
        torchvision=Torchvision(
            cls="PCAM", splits=_TRAIN_VAL_TEST, needs="pcam/camelyonpatch_level_2_split_*_{x,y}.h5"
        ),
        hub=_wds("vtab-pcam", note=_NO_VAL),
    ),
    Row(
        name="tiny_imagenet",
        title="TinyImageNet",
        splits={"train": 100_000, "val": 10_000},
        evaluated="val",
        classes=200,
        resize="square",
        licence="ImageNet's terms: non-commercial research and education only.",
        citation="Le & Yang 2015, Tiny ImageNet Visual Recognition Challenge, Stanford CS231N",
        curated="tiny_imagenet",
        hub=Hub(repo="zh-plus/tiny-imagenet", form="parquet", splits={"train": "train", "val": "valid"}),
        folder="tiny_imagenet",
    ),
    Row(
        name="digits",
        title="Digits",
        splits={"train": 1_352, "test": 445},
        evaluated="test",
        classes=10,
        resize="square",
        licence="CC BY 4.0 (UCI).",
        citation="Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository",
        default="bundled",
        note="It comes with scikit-learn; every fourth image of each class is the test split.",
    ),
    Row(
        name="mscoco_captions",
        title="MS COCO captions",
        splits={"train": 82_783, "test": 5_000},
        evaluated="test",
        classes=0,
        resize="crop",
        licence="Annotations CC BY 4.0; images under Flickr's terms of use.",
        citation="Lin et al. 2014, Microsoft COCO: Common Objects in Context, ECCV; "
        "split of Karpathy & Fei-Fei 2015, CVPR",
        hub=_wds("mscoco_captions"),
        folder="captions",
        note="The test split is Karpathy's; the train split is COCO's train2014 without Karpathy's restval.",
    ),
    Row(
        name="flickr30k",
        title="Flickr30k",
        splits={"train": 29_000, "test": 1_000},
        evaluated="test",
        classes=0,
        resize="crop",
        licence="Non-commercial research and education only; images under Flickr's terms of use.",
        citation="Young, Lai, Hodosh & Hockenmaier 2014, From Image Descriptions to Visual Denotations, TACL; "
        "split of Karpathy & Fei-Fei 2015, CVPR",
        hub=_wds("flickr30k"),
        folder="captions",
        note="The splits are Karpathy's.",
    ),
    Row(
        name="flickr8k",
        title="Flickr8k",
        splits={"train": 6_000, "test": 1_000},
        evaluated="test",
        classes=0,
        resize="crop",
        licence="Non-commercial research and education only; images under Flickr's terms of use.",
        citation="Hodosh, Young & Hockenmaier 2013, Framing Image Description as a Ranking Task, JAIR",
        hub=_wds("flickr8k"),
        folder="captions",
    ),
)


def _offered() -> list[Row]:
    """Load the rows that other packages offer through the entry-point group `rayclip.datasets`."""
    return [entry.load() for entry in entry_points(group="rayclip.datasets")]


ROWS: Mapping[str, Row] = {row.name: row for row in (*_ALL, *_offered())}
CLASSIFIED = tuple(row.name for row in _ALL if row.classes)

# MMCoA's 15 data sets, in the order of the columns of its tables II and III.
MMCOA_15 = (
    "imagenet",
    "cifar10",
    "cifar100",
    "tiny_imagenet",
    "stl10",
    "sun397",
    "food101",
    "oxford_pets",
    "flowers102",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "country211",
    "caltech101",
    "caltech256",
)

# The 16 zero-shot targets of SAFT and TTC.
ZERO_SHOT_16 = tuple(ROWS)[:16]

"""Miniature copies of every published form of a data set: exactly the files that torchvision or a folder source reads.

    wanted = make("cifar10", tmp_path, monkeypatch)
    source = TorchvisionSource(DATASETS["cifar10"], tmp_path, download=False)

Every class of the real set is there, with the real class folders or annotation files; only the images are few and tiny.
"""

import csv
import hashlib
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torchvision.datasets as sets
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet

Wanted = dict[str, list[tuple[int, bytes]]]


def make(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """Write the published form `name` into `folder`, which is torchvision's `root` or what `--source folder` is given.

    Args:
        name: a key of `TORCHVISION` (a row's name: the form that torchvision reads) or of `FOLDERS` (`imagefolder`,
            `imagenet_folder`, `imagenet_kaggle`, `tiny_imagenet_folder`).
        folder: made where it is missing.
        monkeypatch: sets torchvision's tables of checksums to the miniature's files, where it has such tables.

    Returns:
        For each split, by our names: (label, encoded image) of every record in the order in which a source gives them.
        File sets: the file's own bytes. CIFAR, STL-10, PCAM: some PNG of the same pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {**TORCHVISION, **FOLDERS}[name](folder, monkeypatch)


_NUMBERS = itertools.count()


def jpeg() -> bytes:
    """A small JPEG that differs from all others of this process."""
    n = next(_NUMBERS)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (n % 256, n // 256 % 256, 90)).save(buffer, "jpeg", comment=str(n))
    return buffer.getvalue()


def pixels(size: int) -> np.ndarray:
    """Random pixels, (size, size, 3) uint8, other ones each time."""
    return np.random.default_rng(next(_NUMBERS)).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> bytes:
    """Write a file and the folders above it; gives its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(data)
    return data


def curated(key: str) -> list[str]:
    """Keys, or names, of `classnames.json` in label order."""
    text = (Path(__file__).parents[2] / "rayclip" / "data" / "classnames.json").read_text(encoding="utf-8")
    return list(json.loads(text)[key])


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _cifar(cls: type, key: str, names: list[str]) -> Callable[[Path, pytest.MonkeyPatch], Wanted]:
    def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
        base = folder / cls.base_folder
        wanted: Wanted = {"train": [], "test": []}
        lists = {"train": cls.train_list, "test": cls.test_list}
        for split, files in lists.items():
            per_file = -(-len(names) // len(files)) + 1
            labels = itertools.cycle(range(len(names)))
            for file, _ in files:
                images = [pixels(32) for _ in range(per_file)]
                batch = list(itertools.islice(labels, per_file))
                wanted[split] += [(label, png(image)) for label, image in zip(batch, images, strict=True)]
                data = np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images])
                put(base / file, pickle.dumps({"data": data, key: batch}))
        put(base / cls.meta["filename"], pickle.dumps({cls.meta["key"]: [name.replace(" ", "_") for name in names]}))
        for table, files in (("train_list", cls.train_list), ("test_list", cls.test_list)):
            monkeypatch.setattr(cls, table, [[file, _md5(base / file)] for file, _ in files])
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": _md5(base / cls.meta["filename"])})
        return wanted

    return write


def _stl10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, names, wanted = folder / "stl10_binary", curated("stl10"), {}
    for split, count in (("train", 12), ("test", 11)):
        images, labels = [pixels(96) for _ in range(count)], [i % 10 for i in range(count)]
        wanted[split] = [(label, png(image)) for label, image in zip(labels, images, strict=True)]
        # Column-major, as the authors' MATLAB wrote it.
        put(base / f"{split}_X.bin", b"".join(image.transpose(2, 1, 0).tobytes() for image in images))
        put(base / f"{split}_y.bin", bytes(label + 1 for label in labels))
    put(base / "unlabeled_X.bin", pixels(96).tobytes())
    put(base / "class_names.txt", "\n".join(names) + "\n")
    put(base / "fold_indices.txt", "0 1 2\n" * 10)
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(sets.STL10, table, [[file, _md5(base / file)] for file, _ in getattr(sets.STL10, table)])
    return wanted


def _imagenet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """The three archives: training images as a tar of tars, validation images flat, the devkit with its synsets."""
    wnids = imagenet_wnids()
    # The devkit numbers the synsets in an order of its own; inner nodes, with children, follow.
    order = [*wnids[500:], *wnids[:500]]
    leaves = [(i + 1, wnid, f"word {wnid}, synonym", "gloss", 0) for i, wnid in enumerate(order)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array([*leaves, (1001, "n00000001", "entity", "all", 1000)], dtype=kinds)})
    numbers = [i * 7 % 1000 + 1 for i in range(1000)]
    _tar(
        folder / "ILSVRC2012_devkit_t12.tar.gz",
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": mat.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in numbers),
        },
    )
    train = {wnid: {f"{wnid}_{i}.JPEG": jpeg() for i in range(1 + (wnid == wnids[0]))} for wnid in wnids}
    _tar(folder / "ILSVRC2012_img_train.tar", {f"{wnid}.tar": _tar(None, files) for wnid, files in train.items()})
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg() for i in range(1000)}
    _tar(folder / "ILSVRC2012_img_val.tar", val)
    label = {wnid: i for i, wnid in enumerate(wnids)}
    for part, (file, _) in imagenet.ARCHIVE_META.items():
        monkeypatch.setitem(imagenet.ARCHIVE_META, part, (file, _md5(folder / file)))
    labelled = zip((label[order[n - 1]] for n in numbers), val.values(), strict=True)
    return {
        "train": [(label[wnid], image) for wnid, files in train.items() for image in files.values()],
        "val": sorted(labelled, key=lambda pair: pair[0]),
    }


def imagenet_wnids() -> list[str]:
    """ImageNet's thousand, sorted."""
    return curated("imagenet")


def _tar(path: Path | None, files: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if path and path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return put(path, buffer.getvalue()) if path else buffer.getvalue()


def _caltech101(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wanted = folder / "caltech101" / "101_ObjectCategories", []
    put(base / "BACKGROUND_Google" / "image_0001.jpg", jpeg())
    for label, name in enumerate(curated("caltech101")):
        for i in range(1, 3):
            wanted.append((label, put(base / name / f"image_{i:04d}.jpg", jpeg())))
    return {"test": wanted}


CALTECH256 = [
    *("001.ak47", "002.american-flag", "003.backpack", "004.baseball-bat"),
    *(f"{i:03d}.class-{i}" for i in range(5, 251)),
    *("251.airplanes-101", "252.car-side-101", "253.faces-easy-101", "254.greyhound", "255.tennis-shoes"),
    *("256.toad", "257.clutter"),
]


def _caltech256(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wanted = folder / "caltech256" / "256_ObjectCategories", []
    for label, name in enumerate(CALTECH256):
        wanted.append((label, put(base / name / f"{label + 1:03d}_0001.jpg", jpeg())))
    put(base / CALTECH256[0] / "notes.txt", "left over")
    return {"test": wanted}


def _oxford_pets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, names, wanted = folder / "oxford-iiit-pet", curated("oxford_pets"), {}
    for split, file in (("train", "trainval"), ("test", "test")):
        ids, wanted[split] = [], []
        for label, name in enumerate(names):
            # Cats have capitals, dogs have none.
            stem = name.replace(" ", "_") if label % 3 == 0 else name.replace(" ", "_").lower()
            ids.append(f"{stem}_{100 + (split == 'test')} {label + 1} {1 + bool(label % 3)} 1")
            wanted[split].append((label, put(base / "images" / f"{ids[-1].split()[0]}.jpg", jpeg())))
        put(base / "annotations" / f"{file}.txt", "\n".join(ids) + "\n")
    return wanted


def _flowers102(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base = folder / "flowers-102"
    labels = [(i * 5) % 102 + 1 for i in range(102 * 3)]
    images = [put(base / "jpg" / f"image_{i + 1:05d}.jpg", jpeg()) for i in range(len(labels))]
    ids = {"train": range(1, 103), "val": range(103, 205), "test": range(306, 204, -1)}
    savemat(base / "imagelabels.mat", {"labels": np.array(labels)})
    names = {"train": "trnid", "val": "valid", "test": "tstid"}
    savemat(base / "setid.mat", {names[split]: np.array(list(numbers)) for split, numbers in ids.items()})
    table = {key: (file, _md5(base / file)) for key, (file, _) in sets.Flowers102._file_dict.items() if key != "image"}
    monkeypatch.setattr(sets.Flowers102, "_file_dict", {**sets.Flowers102._file_dict, **table})
    return {split: [(labels[i - 1] - 1, images[i - 1]) for i in numbers] for split, numbers in ids.items()}


AIRCRAFT = ["707-320", "727-200", "F-16A/B", "F/A-18", *(f"Variant {i}" for i in range(96))]


def _fgvc_aircraft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wanted, number = folder / "fgvc-aircraft-2013b" / "data", {}, itertools.count(34_958)
    put(base / "variants.txt", "".join(f"{name}\n" for name in AIRCRAFT))
    for split in ("train", "val", "test"):
        lines, wanted[split] = [], []
        for label, name in reversed(list(enumerate(AIRCRAFT))):
            lines.append(f"{next(number):07d} {name}")
            wanted[split].append((label, put(base / "images" / f"{lines[-1][:7]}.jpg", jpeg())))
        put(base / f"images_variant_{split}.txt", "\n".join(lines) + "\n")
    return wanted


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", *(f"Maker Model-{i} Coupe 2012" for i in range(194))]


def _stanford_cars(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wanted = folder / "stanford_cars", {}
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(CARS, dtype=object)})
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows, wanted[split] = [], []
        for i in range(200):
            label = (i * 3 + 1) % 196
            rows.append((0, 0, 8, 8, label + 1, f"{i + 1:05d}.jpg"))
            wanted[split].append((label, put(base / f"cars_{split}" / rows[-1][-1], jpeg())))
        names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        savemat(base / file, {"annotations": np.array(rows, dtype=[(name, "O") for name in names])})
    return wanted


def _food101(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, names, wanted = folder / "food-101", [name.replace(" ", "_") for name in curated("food101")], {}
    for split in ("train", "test"):
        listed, wanted[split] = {}, []
        for label, name in sorted(enumerate(names), key=lambda pair: pair[0] * 7 % 101):  # the file is in no order
            listed[name] = [f"{name}/{split}{1_000 + label}"]
            wanted[split].append((label, put(base / "images" / f"{listed[name][0]}.jpg", jpeg())))
        put(base / "meta" / f"{split}.json", json.dumps(listed))
    return wanted


SUN = ["abbey", "airplane_cabin", "apartment_building/outdoor", *(f"zone_{i:03d}/indoor" for i in range(394))]


def _sun397(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base = folder / "SUN397"
    put(base / "ClassName.txt", "".join(f"/{name[0]}/{name}\n" for name in SUN))
    found = {}
    for label, name in reversed(list(enumerate(SUN))):
        path = f"{name[0]}/{name}/sun_a{label:03d}.jpg"
        found[path] = (label, put(base / path, jpeg()))
    return {"test": [found[path] for path in sorted(found)]}


def _country211(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    wanted = {}
    for split, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        wanted[split] = [
            (label, put(folder / "country211" / theirs / code / f"{i}.jpg", jpeg()))
            for label, code in enumerate(curated("country211"))
            for i in range(1 + (label == 3))
        ]
    return wanted


def _eurosat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    return {
        "test": [
            (label, put(folder / "eurosat" / "2750" / name / f"{name}_{i}.jpg", jpeg()))
            for label, name in enumerate(curated("eurosat"))
            for i in range(1, 4)
        ]
    }


def _dtd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wanted = folder / "dtd" / "dtd", {}
    for split in ("train", "val", "test"):
        lines, wanted[split] = [], []
        for label, name in enumerate(curated("dtd")):
            lines.append(f"{name}/{name}_{split}.jpg")
            wanted[split].append((label, put(base / "images" / lines[-1], jpeg())))
        put(base / "labels" / f"{split}1.txt", "\n".join(lines) + "\n")
    return wanted


def _pcam(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wanted = folder / "pcam", {}
    base.mkdir()
    for split, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        images, labels = np.stack([pixels(96) for _ in range(5)]), [0, 1, 1, 0, 1]
        stem = f"camelyonpatch_level_2_split_{theirs}"
        with h5py.File(base / f"{stem}_x.h5", "w") as file:
            file["x"] = images
        with h5py.File(base / f"{stem}_y.h5", "w") as file:
            file["y"] = np.array(labels, dtype=np.uint8).reshape(-1, 1, 1, 1)
        wanted[split] = [(label, png(image)) for label, image in zip(labels, images, strict=True)]
    return wanted


def _imagefolder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """Four classes in train, val and test."""
    return {
        split: _classes(folder / split, ["banana", "fire_truck", "lemon", "tabby_cat"], 2)
        for split in ("train", "val", "test")
    }


def _imagenet_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    return {split: _classes(folder / split, imagenet_wnids(), 1, ".JPEG") for split in ("train", "val")}


def _imagenet_kaggle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    base, wnids = folder / "ILSVRC" / "Data" / "CLS-LOC", imagenet_wnids()
    put(folder / "LOC_synset_mapping.txt", "".join(f"{wnid} word {wnid}, synonym\n" for wnid in wnids))
    wanted = {"train": _classes(base / "train", wnids, 1, ".JPEG"), "val": []}
    rows = []
    for i in range(1000):
        label = i * 7 % 1000
        name = f"ILSVRC2012_val_{i + 1:08d}"
        wanted["val"].append((label, put(base / "val" / f"{name}.JPEG", jpeg())))
        rows.append([name, f"{wnids[label]} 1 2 3 4 {wnids[label]} 5 6 7 8 "])
    with (folder / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ImageId", "PredictionString"], *reversed(rows)])
    put(base / "test" / "ILSVRC2012_test_00000001.JPEG", jpeg())
    return wanted


def _tiny_imagenet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """`wnids.txt` is in an order of its own, so that sorting it would give wrong labels."""
    base, wnids = folder / "tiny-imagenet-200", curated("tiny_imagenet")
    put(base / "wnids.txt", "".join(f"{wnid}\n" for wnid in wnids))
    put(base / "words.txt", "".join(f"{wnid}\tword {wnid}, synonym\n" for wnid in ["n00001740", *sorted(wnids)]))
    wanted: Wanted = {"train": [], "val": []}
    for label, wnid in enumerate(wnids):
        for i in range(2):
            image = put(base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", jpeg())
            wanted["train"].append((label, image))
        put(base / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    found = {}
    for i in range(300):
        label = i * 7 % 200
        found[f"val_{i}.JPEG"] = (label, put(base / "val" / "images" / f"val_{i}.JPEG", jpeg()))
    lines = (f"{name}\t{wnids[label]}\t0\t32\t44\t62\n" for name, (label, _) in found.items())
    put(base / "val" / "val_annotations.txt", "".join(lines))
    put(base / "test" / "images" / "test_0.JPEG", jpeg())
    wanted["val"] = [found[name] for name in sorted(found)]
    return wanted


def _classes(folder: Path, names: Iterable[str], each: int, ending: str = ".jpg") -> list[tuple[int, bytes]]:
    return [
        (label, put(folder / name / f"{name}_{i}{ending}", jpeg()))
        for label, name in enumerate(names)
        for i in range(each)
    ]


Writer = Callable[[Path, pytest.MonkeyPatch], Wanted]

TORCHVISION: dict[str, Writer] = {
    "cifar10": _cifar(sets.CIFAR10, "labels", curated("cifar10")),
    "cifar100": _cifar(sets.CIFAR100, "fine_labels", curated("cifar100")),
    "stl10": _stl10,
    "imagenet": _imagenet,
    "caltech101": _caltech101,
    "caltech256": _caltech256,
    "oxford_pets": _oxford_pets,
    "flowers102": _flowers102,
    "fgvc_aircraft": _fgvc_aircraft,
    "stanford_cars": _stanford_cars,
    "food101": _food101,
    "sun397": _sun397,
    "country211": _country211,
    "eurosat": _eurosat,
    "dtd": _dtd,
    "pcam": _pcam,
}
FOLDERS: dict[str, Writer] = {
    "imagefolder": _imagefolder,
    "imagenet_folder": _imagenet_folder,
    "imagenet_kaggle": _imagenet_kaggle,
    "tiny_imagenet_folder": _tiny_imagenet,
}
ARRAYS = frozenset({"cifar10", "cifar100", "stl10", "pcam"})

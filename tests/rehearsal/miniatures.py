"""Miniatures of what the papers' scale needs: data sets, a CLIP, a masked language model, captions of all classes.

python -m rehearsal.miniatures FOLDER      # to run a sweep by hand: see `command` in test_sweeps.py
"""

import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from calling import run_here
from conftest import tiny_clip
from data import forms
from data.hub_forms import image_structs, write_parquet
from rayclip.data.images import to_model_size
from rayclip.data.registry import DATASETS, DatasetInfo
from rayclip.models import Clip, load_model
from rayclip.models.checkpoint import save_checkpoint

NATIVE = {"cifar10": 32, "cifar100": 32, "stl10": 96, "tiny_imagenet": 64, "eurosat": 64, "pcam": 96}  # pixels
TRAINED_ON = ("imagenet", "cifar10", "cifar100", "tiny_imagenet")
PER_CLASS, TESTED = 2, 40  # images: of each class to train on, and of each test split
# ViT-B/32's layout, smaller: patches of 32 pixels, two blocks of width 32, images of 64 pixels
LAYOUT = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = (
    "a {} with a long tail, seen from the side",
    "a close picture of the {} on white paper",
    "the {} is small and has round edges",
    "most people know a {} by its colour",
    "a drawing of a {} that stands in a field",
    "an old {} behind a window",
)


@dataclasses.dataclass(frozen=True)
class Miniatures:
    """A folder with all of them; `data` is the root of the prepared data sets."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def model(self) -> str:
        return f"local-dir:{self.folder / 'clip'}"

    @property
    def language_model(self) -> str:
        return str(self.folder / "bert")

    @property
    def captions(self) -> str:
        return str(self.folder / "captions")


def make(folder: Path) -> Miniatures:
    """Make the models, prepare every data set of the registry with `rayclip data prepare`, and choose captions."""
    made = Miniatures(folder)
    make_clip(folder / "clip")
    make_language_model(folder / "bert")
    clip = load_model(made.model, "cpu")
    sentences: dict[str, list[str]] = {}
    for info in DATASETS.values():
        if info.open is not None:  # bundled
            continue
        source = folder / "sources" / info.name
        kind = write_source(info, source, clip)
        run_here(folder, "data", "prepare", info.name, "--source", kind, source, "--root", made.data, "--quiet")
        sentences |= {name: [caption.format(name) for caption in CAPTIONS] for name in class_names(info)}
    (folder / "sentences.json").write_text(json.dumps(sentences))
    (folder / "captions").mkdir()
    for name in ("tiny_imagenet", *(info.name for info in list(DATASETS.values())[:16])):
        wanted = ["--data", name, "--model", made.model, "--out", folder / "captions" / f"{name}.parquet", "--quiet"]
        run_here(folder, "captions", "filter", "sentences.json", *wanted, RAYCLIP_DATA=str(made.data))
    return made


def class_names(info: DatasetInfo) -> list[str]:
    """The classes as the data set's files spell them."""
    own = {"caltech256": forms.CALTECH256, "fgvc_aircraft": forms.AIRCRAFT, "stanford_cars": forms.CARS}
    own |= {"sun397": forms.SUN}
    if info.name in own:
        return own[info.name]
    if info.curated:
        found = json.loads((Path(forms.__file__).parents[2] / "rayclip/data/classnames.json").read_text())[info.curated]
        return list(found.values() if isinstance(found, dict) else found)
    return [f"Class_{i}" for i in range(info.classes)]


def write_source(info: DatasetInfo, folder: Path, clip: Clip) -> str:
    """Write the files to prepare a data set from; return the kind of source."""
    if info.classes == 0:
        for split in info.splits:
            columns = {"image": image_structs(list(pictures(info, 5))), "captions": [list(CAPTIONS[:5])] * 5}
            write_parquet(folder / f"{split}.parquet", columns)
        return "parquet"
    names = class_names(info)
    if info.folder == "coop":
        listed = {split: [[f"{split}_{i}.jpg", i, n] for i, n in enumerate(names)] for split in info.splits}
        (picture,) = pictures(info, 1)
        for rows in listed.values():
            for file, _, _ in rows:
                forms.put(folder / "images" / file, picture)
        forms.put(folder / "split_zhou_Miniature.json", json.dumps(listed))
        return "folder"
    for split in info.splits:
        if split == info.evaluated:
            images = list(pictures(info, TESTED, side=500))
            labels = predictions(clip, names, images, info.resize)  # attacks leave alone what is wrong before
        else:
            labels = list(range(len(names))) * (PER_CLASS if info.name in TRAINED_ON else 1)
            labels += [0] * 5 * (info.name in TRAINED_ON)  # `#validation` keeps one in five of a class
            images = list(pictures(info, len(labels)))
        write_parquet(
            folder / f"{split}.parquet", {"image": image_structs(images), "label": labels}, names, row_group=500
        )
    return "parquet"


def pictures(info: DatasetInfo, count: int, side: int = 80) -> Iterator[bytes]:
    """Coloured blots: PNGs of the data set's size, or JPEGs, wide or high, of about `side` pixels."""
    draw = np.random.default_rng(len(info.name) * 1_000_003 + count)
    for number in range(count):
        size = (NATIVE[info.name],) * 2 if info.name in NATIVE else (side, side * 3 // 4)[:: 1 - 2 * (number % 2)]
        blots = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        blots.resize(size, Image.Resampling.BICUBIC).save(encoded, "png" if info.name in NATIVE else "jpeg")
        yield encoded.getvalue()


@torch.no_grad()
def predictions(clip: Clip, names: Sequence[str], images: Sequence[bytes], resize: str) -> list[int]:
    """The classes that the untouched model sees."""
    opened = [to_model_size(Image.open(io.BytesIO(image)).convert("RGB"), clip.image_size, resize) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]).float() / 255
    texts = clip.embed_texts([f"This is a photo of a {name}" for name in names])
    return (clip.encode_image(pixels, normalize=True) @ texts.T).argmax(1).tolist()


def make_clip(folder: Path) -> None:
    """Write a CLIP with random weights and ViT-B/32's layout."""
    clip = tiny_clip(**LAYOUT)
    clip.config["preprocess_cfg"] |= {"size": [64, 64]}
    save_checkpoint(clip, folder, {})


def make_language_model(folder: Path) -> None:
    """Write a masked language model with random weights and a vocabulary of BERT's form: special and unused tokens,
    characters, words, and ends of words."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = sorted({word.lower() for info in DATASETS.values() for name in class_names(info) for word in name.split()})
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1][::2]  # others in pieces
    vocabulary = [
        *("[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *("!-'(),./0123456789:", *letters, "this", "is", "a", "photo", "of", *words),
        *(f"##{letter}" for letter in letters),
        *("##s", "##ed", "##ing", "##er", "##fish"),
    ]
    vocabulary = list(dict.fromkeys(vocabulary))
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **size)
    BertForMaskedLM(config).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())

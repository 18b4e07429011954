"""Train the bundled model `digits` from scratch: `python -m rayclip.training.pretrain_digits --out DIR`.

A CLIP of 3.7 million parameters (3.2 of them CLIP's token table) learns the digits' train split from captions such as
"a handwritten seven". It uses one thread and fixed seeds: two runs on one machine give identical bytes.
"""

import argparse
import hashlib
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP

from rayclip.data import batch_pixels
from rayclip.data.digits import CLASS_NAMES, Digits
from rayclip.methods.losses import contrastive
from rayclip.models import Clip, ZeroShot
from rayclip.models.checkpoint import save_checkpoint
from rayclip.models.loading import WEIGHTS_FILE

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 8, "layers": 4, "width": 96, "head_width": 24, "patch_size": 2},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "size": [8, 8],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
    },
}

TEMPLATES = (
    "This is a photo of a {}",
    "This is a photo of the {}",
    "a photo of a {}",
    "a picture of the {}",
    "an image of a {}",
    "a handwritten {}",
    "a {} written by hand",
    "the digit {}",
    "the number {}",
    "a scan of the digit {}",
    "a blurry photo of the number {}",
    "a small drawing of a {}",
    "someone wrote a {}",
    "a grey {} on black",
    "{}",
)
EXTRA_NAMES = {
    "zero": ("nought", "null"),
    "one": ("single",),
    "two": ("pair",),
    "three": ("trio",),
    "six": ("half dozen",),
}


def captions(label: int, rng: random.Random) -> str:
    """Return a random template filled with the class's name, its digit or a synonym."""
    name = CLASS_NAMES[label]
    spelled = rng.choice((name, name, str(label), *EXTRA_NAMES.get(name, ())))
    return rng.choice(TEMPLATES).format(spelled)


def pretrain(epochs: int, seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(seed)
    cfg = CONFIG["model_cfg"]
    model = CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=cfg["text_cfg"]["context_length"])
    clip = Clip(model, CONFIG, tokenizer, "digits").train()

    data = Digits("train")
    pixels = batch_pixels(data, range(len(data)), "native", clip.image_size).float() / 255
    labels = torch.from_numpy(data.labels)
    batch_size = 128
    steps_per_epoch = len(data) // batch_size
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps_per_epoch)
    for epoch in range(epochs):
        order = torch.randperm(len(data))
        for step in range(steps_per_epoch):
            rows = order[step * batch_size : (step + 1) * batch_size]
            texts = clip.tokenize([captions(label, rng) for label in labels[rows].tolist()])
            loss = contrastive(
                clip.encode_image(pixels[rows]), clip.encode_text(texts), labels[rows], clip.scale, batch_size, "class"
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}", flush=True)
    return clip.eval()


def accuracy(clip: Clip) -> float:
    """Return the zero-shot accuracy on the test split, in percent."""
    data = Digits("test")
    pixels = batch_pixels(data, range(len(data)), "native", clip.image_size).float() / 255
    with torch.no_grad():
        right = ZeroShot(clip, data.class_names)(pixels).argmax(1) == torch.from_numpy(data.labels)
    return 100 * right.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the bundled model 'digits' from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    clip = pretrain(args.epochs)
    save_checkpoint(
        clip, args.out, {"made_by": "python -m rayclip.training.pretrain_digits", "epochs": args.epochs}, torch.float16
    )
    digest = hashlib.sha256((args.out / WEIGHTS_FILE).read_bytes()).hexdigest()
    print(f"zero-shot accuracy on the test split: {accuracy(clip):.2f} %\nsha256 of {WEIGHTS_FILE}: {digest}")


if __name__ == "__main__":
    main()

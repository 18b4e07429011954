"""Write adversarial texts, and a cell's examples for people to look at: its first images before and after the attack,
attention maps, embeddings, and changed prompts. They are small and written with the batch that holds the first sample.

Shapes: B batch, D embedding, C H W image.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from rayclip.attacks import Adversarial, Attack
from rayclip.models import Clip, ZeroShot
from rayclip.models.attention import encode_with_patches, text_guided_attention
from rayclip.store import Store
from rayclip.types import UserError

EXAMPLES = 8  # images kept per cell for the grid of clean, adversarial, difference
EMBEDDED = 128  # maximum images per cell whose embeddings are kept, in half precision: 260 kB for 512 dimensions
PROMPTS = 16  # changed prompts kept per cell


def keep_examples(
    store: Store,
    folder: str,
    victim: ZeroShot,
    *,
    images_BCHW: Tensor,
    result: Adversarial,
    verdicts: Mapping[str, np.ndarray],
    prompts: Sequence[str] | None,
    eps: float,
) -> None:
    """Write a cell's examples below `folder`.

    Changed prompts are in `texts.json`; changed images in `images.parquet`, `features.parquet` and, for models that
    have attention maps, `attention.parquet`.

    Args:
        victim: the attacked classifier, without defences; its model gives embeddings and maps.
        verdicts: the columns of the result file, of B rows.
        prompts: adversarial class prompts; None if they were not changed.
        eps: budget; the difference is scaled so that ±eps fills the range of pixels.
    """
    labels = verdicts["label"].tolist()
    changed = changed_prompts(victim, labels, result, prompts)
    if changed:
        store.write_json(f"{folder}/texts.json", changed)
    if result.images_BCHW is images_BCHW:
        return

    def write(name: str, count: int, columns: Sequence[str], **more: Any) -> None:
        store.write_table(f"{folder}/{name}.parquet", {key: verdicts[key][:count] for key in columns} | more)

    pairs = {"clean": images_BCHW, "adversarial": result.images_BCHW}
    few = {key: images[:EXAMPLES] for key, images in pairs.items()}
    difference = (few["adversarial"] - few["clean"]) / (2 * max(eps, 1e-9)) + 0.5
    pictures = {key: pngs(images) for key, images in (few | {"difference": difference}).items()}
    write("images", EXAMPLES, ("sample_id", "label", "clean_pred", "adv_pred"), **pictures)
    features = {key: _features(victim.clip, images[:EMBEDDED]) for key, images in pairs.items()}
    write("features", EMBEDDED, ("sample_id", "label"), **features)
    maps = {key: attention_maps(victim, images, labels[:EXAMPLES]) for key, images in few.items()}
    if maps["clean"] is not None:
        write("attention", EXAMPLES, ("sample_id",), **maps)


def prepare_texts(
    attack: Attack, victim: ZeroShot, store: Store, name: str, owners: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the adversarial texts in a file, which is written with those that the attack prepares if there is none.

    Args:
        owners: class of each text, which the file then also holds.
    """
    stored = store.read_json(name, list)
    if stored is None:
        made = attack.prepare(victim)
        assert made is not None
        stored = [{"clean": c, "adversarial": a} for c, a in zip(victim.prompts, made, strict=True)]
        if owners is not None:
            stored = [{"class": owner, **entry} for owner, entry in zip(owners, stored, strict=True)]
        store.write_json(name, stored)
    return tuple(entry["adversarial"] for entry in stored)


def changed_prompts(
    victim: ZeroShot, labels: Sequence[int], result: Adversarial, prompts: Sequence[str] | None
) -> list[dict[str, str]]:
    """Return the first prompts that an attack changed, with their classes: the classes' own, or those of the first
    images."""
    if prompts is not None:
        owners = [name for i, name in enumerate(victim.class_names) for _ in victim.prompts_of(i)]
        pairs = list(zip(owners, victim.prompts, prompts, strict=True))
    else:
        pairs = [
            (victim.class_names[label], clean, adversarial)
            for label, texts in zip(labels, result.own_texts or (), strict=False)
            for clean, adversarial in zip(victim.prompts_of(label), texts, strict=False)
        ]
    changed = [{"class": c, "clean": p, "adversarial": a} for c, p, a in dict.fromkeys(pairs) if p != a]
    return changed[:PROMPTS]


@torch.no_grad()
def attention_maps(victim: ZeroShot, images_BCHW: Tensor, labels: Sequence[int]) -> list[bytes] | None:
    """Return grey PNGs of the input size: where an image resembles its true class's prompt; None without such maps."""
    clip = victim.clip
    texts = [clip.embed_texts(victim.prompts_of(label))[:1] for label in labels]
    try:
        _, patches_BTD = encode_with_patches(clip, images_BCHW)
        maps = text_guided_attention(clip, patches_BTD, torch.stack(texts))
    except UserError:
        return None
    side = clip.image_size
    return [_png(np.asarray(x)) for x in (maps.reshape(-1, side, side) * 255).round().byte().cpu().numpy()]


@torch.no_grad()
def _features(clip: Clip, images_BCHW: Tensor) -> pa.Array:
    features = clip.encode_image(images_BCHW).to(torch.float16).cpu().numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])


def to_8_bits(images_BCHW: Tensor) -> Tensor:
    """Return images in [0, 1] as bytes, rounded to the nearest 255th."""
    return (images_BCHW.clamp(0, 1) * 255).round().byte()


def pngs(images_BCHW: Tensor) -> list[bytes]:
    """Return RGB images in [0, 1] as encoded PNG files."""
    return [_png(x) for x in to_8_bits(images_BCHW).permute(0, 2, 3, 1).cpu().numpy()]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()

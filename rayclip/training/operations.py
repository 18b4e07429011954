"""Count the floating-point operations of a training, without training: for plans on hardware that is not here."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from rayclip.methods import Batch, ClassTexts, Method, Original
from rayclip.models import TEMPLATE, Clip
from rayclip.models.clip import frozen
from rayclip.models.lora import Lora
from rayclip.rng import sample_keys
from rayclip.training.loop import choose_trainable
from rayclip.training.step import LossOf, attack_and_backward

_CLASSES, _CAPTIONS = 4, 32  # of the small steps that are counted


class Operations(NamedTuple):
    """Floating-point operations of matrix products, where a multiplication and the addition after it are two.

    Attributes:
        image: of each image in an epoch.
        each_class: of each class in a step: its prompts are trained on.
        present: of each class in a step that the batch has images of: its prompts are attacked.
        before: of each image, once before the first epoch.
    """

    image: float
    each_class: float
    present: float
    before: float

    def total(self, images: int, classes: int, steps: int, batch_size: int) -> float:
        """Return the operations of a whole training."""
        return images * self.before + steps * self.step(images, classes, batch_size)

    def step(self, images: int, classes: int, batch_size: int) -> float:
        """Return the operations of a step; those of an epoch have nearly equal batches."""
        size = images / -(-images // batch_size)
        return size * self.image + classes * self.each_class + min(classes, size) * self.present


def count_operations(method: Method, clip: Clip) -> Operations:
    """Count the operations of small steps, and extrapolate: they are linear in images, attack steps and classes.

    Images are random, and classes have placeholders for names and captions.
    """
    one = _count(method, clip, images=2, steps=1)
    harder = _count(method, clip, images=2, steps=2)
    larger = _count(method, clip, images=4, steps=1)
    mixed = _count(method, clip, images=2, steps=1, present=2)
    further = method.steps - 1
    image, present = (larger.step - one.step) / 2, mixed.step - one.step
    return Operations(
        image=image + further * (harder.step - one.step) / 2,
        each_class=max(0.0, one.step - 2 * image - present) / _CLASSES,
        present=present,
        before=(one.before + further * (harder.before - one.before)) / 2,
    )


class _Counted(NamedTuple):
    before: float
    step: float


def _count(method: Method, clip: Clip, *, images: int, steps: int, present: int = 1) -> _Counted:
    names = [f"class {number}" for number in range(_CLASSES)]
    method = replace(method, steps=steps).with_texts([["a photo of a thing"] * _CAPTIONS] * _CLASSES, names)
    own = method.wrap_model(copy.deepcopy(clip), 0)
    prompts = method.prompts(names, own.template or TEMPLATE)
    choose_trainable(own, method)
    if method.lora is not None:
        Lora(own, method.lora, 0)
    original = None
    if method.needs_original:
        original = Original(clip=clip, texts=ClassTexts(clip, prompts, trainable=False))
    size = clip.image_size
    batch = Batch(
        pixels_BCHW=torch.rand(images, 3, size, size, device=clip.device),
        labels_B=torch.arange(images, device=clip.device) % present,
        keys_B=sample_keys(range(images), 0, "count").to(clip.device),
        texts=ClassTexts(own, prompts, trainable=method.trains_texts),
        total=images,
        original=original,
        auxiliary=method.auxiliary(own, 0).to(clip.device),
    )
    with _counting() as preparing:
        if method.prepares:
            with frozen(own):
                batch = replace(batch, prepared_BD=method.prepare(own, batch).float())
    with _counting() as stepping:
        attack_and_backward(LossOf(own, method, batch.auxiliary), own, method, batch)
    return _Counted(preparing.get_total_flops(), stepping.get_total_flops())


def count_forward(clip: Clip) -> float:
    """Count the operations of an image's forward pass through the image encoder."""
    pixels = torch.zeros(1, 3, clip.image_size, clip.image_size, device=clip.device)
    with _counting() as counter, torch.no_grad():
        clip.encode_image(pixels)
    return counter.get_total_flops()


@contextlib.contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count operations; without torch's fused attention for inference, which counters do not know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)

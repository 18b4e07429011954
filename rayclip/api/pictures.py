"""Images and labels as callers have them, read into batches for attacks, and refused where they cannot be meant.

Shapes: B batch, C H W image, K classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rayclip.attacks.geometry import check_pixels
from rayclip.data import Resolution
from rayclip.data.images import to_model_size
from rayclip.types import UserError


class Labelled(NamedTuple):
    """A batch on the device of the model.

    Attributes:
        images_BCHW: pixels in [0, 1], in the caller's dtype.
        labels_B: int64.
        home: the caller's device, to which results go back.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    home: torch.device


class PictureReader:
    """Reads what callers give as images and labels.

    Args:
        device: of the model; None if that is unknown, as of a function: then images stay where they are.
        image_size: side of the model's input, for `resolution` `model`; None if it is unknown.
    """

    def __init__(
        self, device: torch.device | None, image_size: int | None, resolution: Resolution, batch_size: int
    ) -> None:
        if resolution not in ("native", "model"):
            raise UserError(f"resolution '{resolution}' is none: use native or model.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size {batch_size} is no number of images from 1 on.")
        self._device, self._image_size, self._resolution, self._size = device, image_size, resolution, batch_size

    def read(self, images: Any, labels: Any) -> Iterator[Labelled]:
        """Yield batches.

        Args:
            images: pixels `(B, 3, H, W)` or `(3, H, W)`, a PIL image, a list of either, or a DataLoader (any iterable)
                of `(images, labels)`.
            labels: classes of the images as a tensor, a list or a number; None with a DataLoader.

        Raises:
            UserError: pixels outside [0, 1], integers, images of different sizes, as many labels as there are not
                images, or a device that is not the model's.
        """
        if isinstance(images, Tensor | Image.Image | Sequence):
            if labels is None:
                raise UserError("labels are missing: give the true class of each image, from 0 on.")
            given = self._pixels(images, moves=not isinstance(images, Tensor))
            yield from self._parts(given, self._labels(labels, len(given)))
            return
        if not hasattr(images, "__iter__") or isinstance(images, np.ndarray):
            raise UserError(f"images cannot be a {type(images).__name__}: give tensors, PIL images or a DataLoader.")
        if labels is not None:
            raise UserError("a DataLoader brings its own labels: leave labels away (labels=None).")
        for batch in images:
            some, classes = _split(batch)
            given = self._pixels(some, moves=True)
            yield from self._parts(given, self._labels(classes, len(given)))

    def _parts(self, given: Tensor, labels_B: Tensor) -> Iterator[Labelled]:
        check_pixels(given)
        device = self._device or given.device
        for images, labels in zip(given.split(self._size), labels_B.split(self._size), strict=True):
            yield Labelled(images.to(device), labels.to(device), given.device)

    def _pixels(self, images: Any, *, moves: bool) -> Tensor:
        """Return pixels `(B, C, H, W)`; `moves`: tensors may lie on another device than the model."""
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, Tensor):
            return self._checked(images if images.ndim == 4 else images[None], moves=moves)
        if not len(images):
            raise UserError("there are no images to attack: the list is empty.")
        if all(isinstance(image, Image.Image) for image in images):
            return self._opened(images)
        if not all(isinstance(image, Tensor) for image in images):
            raise UserError(
                f"images cannot be a {type(images).__name__} of {type(images[0]).__name__}: give tensors, PIL images "
                "or a DataLoader."
            )
        if len({image.shape for image in images}) > 1:
            raise _different_sizes()
        return self._checked(torch.stack(list(images)), moves=moves)

    def _checked(self, images: Tensor, *, moves: bool) -> Tensor:
        shape, known = tuple(images.shape), self._image_size is not None
        if images.ndim != 4 or not images.numel() or (known and shape[1] != 3):
            channels = "3" if known else "C"
            raise UserError(
                f"images of shape {shape} do not fit: give pixels as (B, {channels}, H, W), channels first, or one "
                f"image as ({channels}, H, W)."
            )
        if not images.is_floating_point():
            raise UserError(f"images of {images.dtype} do not fit: divide bytes by 255, so that pixels are in [0, 1].")
        if known and self._resolution == "model" and shape[2:] != (self._image_size, self._image_size):
            raise UserError(
                f"images of {shape[2]}×{shape[3]} pixels do not fit the model's input of {self._image_size}: resize "
                "them, or let them be perturbed at their own size (resolution='native')."
            )
        if not moves and self._device is not None and not _same(images.device, self._device):
            raise UserError(
                f"the images are on {images.device} and the model is on {self._device}: move one of them, as in "
                f"model.to('{images.device}')."
            )
        return images.detach()

    def _opened(self, images: Sequence[Image.Image]) -> Tensor:
        rgb = [image.convert("RGB") for image in images]
        if self._resolution == "model" and self._image_size is not None:
            rgb = [to_model_size(image, self._image_size) for image in rgb]
        if len({image.size for image in rgb}) > 1:
            raise _different_sizes()
        stacked = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in rgb])
        return stacked.to(self._device).float() / 255

    def _labels(self, labels: Any, count: int) -> Tensor:
        try:
            found = torch.as_tensor(labels if not isinstance(labels, tuple) else list(labels))
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        if found.ndim == 0:
            found = found[None]
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise UserError("labels have to be whole numbers, one per image: the true classes, from 0 on.")
        if len(found) != count:
            raise UserError(f"there are {count} images and {len(found)} labels: give one label per image.")
        return found.long()


def check_labels(labels_B: Tensor, classes: int) -> None:
    """Raise a `UserError` for a label that is no class."""
    wrong = ((labels_B < 0) | (labels_B >= classes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise UserError(f"label {int(labels_B[at])} is no class: there are {classes}, from 0 to {classes - 1}.")


def _split(batch: Any) -> tuple[Any, Any]:
    """Return images and labels of a DataLoader's batch: a pair of them, or pairs of an image and its label each."""
    if isinstance(batch, Sequence) and batch:
        first = batch[0]
        if isinstance(first, Sequence) and len(first) == 2 and _is_label(first[1]):
            return [pair[0] for pair in batch], [int(pair[1]) for pair in batch]
        if len(batch) == 2:
            return batch[0], batch[1]
    raise UserError("a DataLoader has to yield (images, labels).")


def _is_label(value: Any) -> bool:
    return isinstance(value, int | np.integer) or (isinstance(value, Tensor) and value.ndim == 0)


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _different_sizes() -> UserError:
    return UserError(
        "the images differ in size, so that they cannot be perturbed at their own: resize them, or for PIL images use "
        "resolution='model'."
    )

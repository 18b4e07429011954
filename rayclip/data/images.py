"""`ImageSet`, the interface of every labelled data set, and the conversion of images to pixel tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from PIL import Image

from rayclip.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

# `native`: perturb at the data set's own size, resize inside the model (TeCoA, MMCoA).
# `model`: resize first, perturb at the model's input size (SAFT, TTC).
# `clip`: as `model`, the shorter side to the input's and its centre, for every image (CLIP; RobustVLM, CoOp).
Resolution = Literal["native", "model", "clip"]
Resize = Literal["auto", "square", "crop"]


class Images(Protocol):
    """Data that `batch_pixels` accepts, labelled or not; see `ImageSet`."""

    name: str
    resize: Resize

    def images(self, positions: Sequence[int]) -> list[Image.Image]: ...


class ImageSet(ABC):
    """Images with integer labels.

    Attributes:
        name: as it appears in tables and metric names.
        class_names: one per label, in label order.
        labels: `(N,)` int64.
        ids: `(N,)` int64, each sample's row in its source: unchanged in subsets, and the key of its noise.
        fingerprint: a hash of the content; part of every evaluation cell's id.
        raw_names: the class names as the data's source spells them.
        other_names: the class names in the spelling that `class_names` does not have, if there are two.
        resize: how images are resized to the model's input: `square`, `crop` (shorter side, then the centre), or
            chosen by their own shape (`auto`).
        native_size: (width, height) of all images; None if unknown or if sizes differ.
        notes: remarks for readers of its numbers, one sentence each.
    """

    name: str
    class_names: tuple[str, ...]
    raw_names: tuple[str, ...]
    other_names: tuple[str, ...] = ()
    resize: Resize = "auto"
    native_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    labels: np.ndarray
    ids: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        """Return the RGB images at these positions (0..N-1), in this order."""

    def check(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Check that every image can be read, before starting work that one bad image would abort.

        Args:
            on_progress: called with the number of images checked and their total.

        Raises:
            UserError: an image cannot be read.
        """

    def archives(self) -> tuple[int, ...]:
        """Return the number of images in each archive of the WebDataset that the data come from, in order; nothing for
        other sources."""
        return ()

    def subset(self, positions: Sequence[int] | np.ndarray) -> "ImageSet":
        """Return the data restricted to some positions; ids and fingerprint are kept."""
        return _Subset(self, np.asarray(positions, dtype=np.int64))


class _Subset(ImageSet):
    def __init__(self, whole: ImageSet, positions: np.ndarray) -> None:
        for attribute in (
            "name",
            "class_names",
            "raw_names",
            "other_names",
            "fingerprint",
            "resize",
            "native_size",
            "notes",
        ):
            setattr(self, attribute, getattr(whole, attribute))
        self.labels, self.ids = whole.labels[positions], whole.ids[positions]
        self._whole, self._positions = whole, positions

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        return self._whole.images([int(self._positions[p]) for p in positions])

    def check(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self._whole.check(on_progress)
        self.native_size = self._whole.native_size


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Number the samples of each class from 0 on, `(N,)` int64."""
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return rank


def batch_pixels(data: Images, positions: Sequence[int], resolution: Resolution, image_size: int) -> "Tensor":
    """Stack images into one uint8 tensor `(B, 3, H, W)`; divide by 255 for pixels.

    Args:
        resolution: `native` keeps the images' size, which must be the same for all; the others resize to `image_size`.

    Raises:
        UserError: `native` images of different sizes.
    """
    import torch  # imported here, so that commands that only move files start quickly

    images = data.images(positions)
    if resolution != "native":
        rule = "clip" if resolution == "clip" else data.resize
        images = [to_model_size(image, image_size, rule) for image in images]
    elif len({image.size for image in images}) > 1:
        raise mixed_sizes(data)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def mixed_sizes(data: Images) -> UserError:
    return UserError(
        f"the images of '{data.name}' differ in size, so they cannot be attacked at their native resolution in "
        "batches: use --resolution model."
    )


def to_model_size(image: Image.Image, size: int, rule: Resize | Literal["clip"] = "auto") -> Image.Image:
    """Resize by SAFT's and TTC's rule: at 224, small squares by `Resize(224)`, others `Resize(256)` and crop. CLIP's is
    `Resize(224)` and crop."""
    width, height = image.size
    if rule == "square" or (rule == "auto" and width == height <= size):
        return image.resize((size, size), Image.Resampling.BICUBIC)
    ratio = size * (1 if rule == "clip" else 8 / 7) / min(width, height)
    width, height = max(size, round(width * ratio)), max(size, round(height * ratio))
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))

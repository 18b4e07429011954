"""What the public code and ours were given alike: images, random starts, a student that has left the original model.

Shapes: N images, P places of an image.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayclip import rng
from rayclip.attacks import Samples
from rayclip.attacks.geometry import random_start
from rayclip.data import batch_pixels, open_data
from rayclip.models import Clip, ZeroShot, load_model

GOLDEN = Path(__file__).parent / "golden"
PLACES = 8  # pixels of an image that a golden file holds


class Images(NamedTuple):
    """Real images with a model that classifies them.

    Attributes:
        pixels: `(N, 3, H, W)` in [0, 1].
        labels, keys: `(N,)` int64.
    """

    pixels: Tensor
    labels: Tensor
    keys: Tensor
    model: ZeroShot

    @property
    def samples(self) -> Samples:
        return Samples(self.pixels, self.labels, self.keys)

    def start(self, eps: float) -> Tensor:
        """The uniform start in the l_inf ball that both sides begin at."""
        return random_start(self.pixels, self.keys, eps, "linf")

    def stands(self, images: Tensor) -> str:
        """`1` for each image that is classified right, else `0`."""
        with torch.no_grad():
            return "".join(str(int(r)) for r in self.model(images).argmax(1) == self.labels)

    def cut(self, chosen: Tensor) -> "Images":
        """Some of the images, with keys counted anew."""
        return Images(self.pixels[chosen], self.labels[chosen], keys(len(self.labels[chosen])), self.model)


def keys(count: int) -> Tensor:
    return rng.sample_keys(range(count), "parity")


def cifar(shared: Path, count: int, first: int = 0) -> Images:
    """CIFAR-10 test images and pocket-clip."""
    return _images(f"{shared}/data/cifar10-test.parquet", f"local-dir:{shared}/models/pocket-clip", count, first)


def digits(count: int, first: int = 0) -> Images:
    """The bundled digits and their model."""
    return _images("digits", "digits", count, first)


def right_digits(count: int) -> Images:
    """The first `count` digits that the model is right about."""
    found = digits(2 * count)
    with torch.no_grad():
        return found.cut((found.model(found.pixels).argmax(1) == found.labels).nonzero().squeeze(1)[:count])


def _images(data: str, model: str, count: int, first: int) -> Images:
    opened = open_data(data, "test")
    clip = load_model(model)
    places = list(range(first, first + count))
    pixels = batch_pixels(opened, places, "native", clip.image_size).float() / 255
    labels = torch.tensor([int(opened.labels[i]) for i in places])
    return Images(pixels, labels, keys(count), ZeroShot(clip, opened.class_names))


def student(base: Clip) -> Clip:
    """A model whose image tower has moved away from `base`, so that terms that compare the two are not zero."""
    moved = copy.deepcopy(base)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters_of("image"):
            p += 0.02 * (p.std() if p.numel() > 1 else 0.0) * torch.randn(p.shape, generator=noise)
    return moved


def places(change: Tensor) -> list[list[float]]:
    """A perturbation at some places of each image, in 255ths: `(N, C, H, W)` -> N lists of P."""
    flat = change.detach().flatten(1)
    chosen = torch.arange(PLACES) * (flat.shape[1] // PLACES) + torch.arange(PLACES)
    return [[round(255 * value, 4) for value in row] for row in flat[:, chosen].tolist()]


def golden(name: str) -> dict[str, Any]:
    """What the public code gave."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def equal_share(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The share of places that agree to a thousandth of a 255th."""
    return ((torch.tensor(ours) - torch.tensor(theirs)).abs() < 1e-3).float().mean().item()


def numbers_of(loss: Tensor, clip: Clip, part: str) -> dict[str, Any]:
    """A loss with its gradient in the parameters of a part of the model: the norm, and the products with fixed random
    directions."""
    parameters = clip.parameters_of(part)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradient = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    ).double()
    noise = torch.Generator().manual_seed(1)
    directions = torch.randn(4, len(gradient), generator=noise, dtype=torch.float64)
    return {
        "loss": loss.item(),
        "gradient_norm": gradient.norm().item(),
        "gradient_along": (directions @ gradient).tolist(),
    }

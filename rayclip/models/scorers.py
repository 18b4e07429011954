"""Ways to score an image against a class: one template, several, descriptions (CuPL), or crops and descriptions (WCA).

A scorer makes a classifier from a CLIP and a set of classes. Attacks, defences and evaluation only use classifiers.

Shapes: B batch, N crops, C H W image, P texts of all classes in a row, K classes, D embedding.
"""

import hashlib
import json
import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip import rng
from rayclip.models.clip import Clip
from rayclip.models.resizing import Resize
from rayclip.models.zeroshot import ImageViewWrapper, SeveralPrompts, ZeroShot, class_prompts, clean_name
from rayclip.names import Configurables
from rayclip.settings import FILLED_IN, Configurable, format_changes
from rayclip.types import UserError

Texts = tuple[tuple[str, ...], ...]
Templates = Literal["openai", "simple", "clip", "coop"]


@dataclass(frozen=True, kw_only=True)
class Scorer(Configurable, ABC):
    """A scoring method with its settings. Subclasses are frozen dataclasses."""

    noun: ClassVar[str] = "scorer"
    random: ClassVar[bool] = False  # whether it uses random numbers
    takes_own_texts: ClassVar[bool] = True  # whether it can score images that have texts of their own

    @property
    def label(self) -> str:
        """Name, and the settings that differ from the defaults, as a user would write them."""
        return format_changes(self)

    @property
    def cost(self) -> int:
        """Image forward passes per query."""
        return 1

    def describe(self) -> str:
        """Return name and settings as a result's protocol must state them."""
        values = {name: getattr(self, name) for name in self.settings()}
        shown = ", ".join(f"{k} {v}" for k, v in values.items())
        return f"{self.name} ({shown})" if shown else self.name

    @abstractmethod
    def prompts(self, class_names: Sequence[str], template: str) -> list[list[str]]:
        """Return the texts of each class whose embeddings make its weights."""

    @abstractmethod
    def classifier(self, clip: Clip, class_names: Sequence[str], template: str) -> ZeroShot:
        """Return the classifier; made once per model and class set."""

    def for_dataset(self, name: str) -> Self:
        """Return the scorer for a data set of this name (`oxford_pets`), if it depends on that."""
        return self

    def bind(self, classifier: ZeroShot, keys_B: Tensor, *, attacked: bool) -> ZeroShot:
        """Return the classifier for one batch.

        Args:
            keys_B: one 64-bit key per sample, the source of all randomness.
            attacked: draw anew at each query; else a sample gets the same draw at every evaluation.
        """
        return classifier


@dataclass(frozen=True, kw_only=True)
class Template(Scorer):
    """`s · <f(x), g(template with the class's name)>`, the papers' default."""

    name: ClassVar[str] = "template"

    def prompts(self, class_names: Sequence[str], template: str) -> list[list[str]]:
        return [[prompt] for prompt in class_prompts(class_names, template)]

    def classifier(self, clip: Clip, class_names: Sequence[str], template: str) -> ZeroShot:
        return ZeroShot(clip, class_names, template)


@dataclass(frozen=True, kw_only=True)
class Ensemble(Scorer):
    """The normalised mean of the embeddings of many templates (Radford et al. 2021, section 3.1.4).

    Attributes:
        templates: `openai` for the 80 for ImageNet, `simple` for the 7 best of them; or each data set's own
            (`templates.toml`, else those for ImageNet): `clip` for CLIP's, `coop` for the one of CoOp. These two keep
            hyphens and slashes in the names of classes, as CLIP_benchmark and CoOp do.
        own: those of the data set.
    """

    name: ClassVar[str] = "ensemble"

    templates: Templates = "openai"
    own: tuple[str, ...] = field(default=(), repr=False, metadata=FILLED_IN)

    def for_dataset(self, name: str) -> Self:
        return replace(self, own=templates_of(self.templates, name)) if self.templates in ("clip", "coop") else self

    def describe(self) -> str:
        """Return name and settings; a data set's own templates are a hash of them."""
        if not self.own:
            return super().describe()
        return (
            f"{self.name} (templates {self.templates} {hashlib.sha256(json.dumps(self.own).encode()).hexdigest()[:8]})"
        )

    def prompts(self, class_names: Sequence[str], template: str) -> list[list[str]]:
        if self.templates in ("clip", "coop"):
            own = self.own or templates_of(self.templates, "")
            return [[text.format(name.replace("_", " ")) for text in own] for name in class_names]
        return [[make(clean_name(name)) for make in _imagenet(self.templates)] for name in class_names]

    def classifier(self, clip: Clip, class_names: Sequence[str], template: str) -> ZeroShot:
        return SeveralPrompts(clip, class_names, self.prompts(class_names, template), template)


@dataclass(frozen=True, kw_only=True)
class Described(Scorer):
    """Base of scorers that use descriptions of the classes.

    Attributes:
        captions: table of captions, as `rayclip captions filter` writes it, for the classes that are evaluated, or a
            folder with one table per data set; an evaluation reads it before it starts. `digits` brings its own.
        texts: the captions of each class in label order, as read from the table.
    """

    captions: str = ""
    texts: Texts = field(default=(), repr=False, metadata=FILLED_IN)

    def captions_needed(self, bundled: str) -> str:
        if self.texts:
            return ""
        if not (self.captions or bundled):
            raise UserError(
                f"scorer '{self.name}' needs captions of the classes: write {self.name}:captions=FILE, a table as "
                "rayclip captions filter writes it."
            )
        return self.captions or bundled

    def with_texts(self, texts: Sequence[Sequence[str]], class_names: Sequence[str] = (), captions: str = "") -> Self:
        return replace(self, texts=tuple(map(tuple, texts)))

    def describe(self) -> str:
        """Return name and settings; `captions` is a hash of the texts."""
        digest = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]
        return replace(self, captions=digest)._described()

    def _described(self) -> str:
        return super().describe()

    def prompts(self, class_names: Sequence[str], template: str) -> list[list[str]]:
        return [list(own) for own in self.needed_texts(class_names)]

    def needed_texts(self, class_names: Sequence[str]) -> Texts:
        if len(self.texts) != len(class_names):
            raise ValueError(f"captions of {len(self.texts)} classes for {len(class_names)}: call with_texts")
        return self.texts


@dataclass(frozen=True, kw_only=True)
class CuPL(Described):
    """CuPL (Pratt et al. 2023): the normalised mean of the embeddings of a class's descriptions."""

    name: ClassVar[str] = "cupl"

    def classifier(self, clip: Clip, class_names: Sequence[str], template: str) -> ZeroShot:
        return SeveralPrompts(clip, class_names, self.needed_texts(class_names), template)


@dataclass(frozen=True, kw_only=True)
class WCA(Described):
    """WCA (Li et al. 2024, weighted visual-text cross alignment): random crops against descriptions, both weighted.

    `Σ_i Σ_j w_i v_j <f(crop_i), g(text_j)>`, w the softmax over the crops of `e^4 · <f(crop_i), f(x)>`, v that over the
    class's descriptions of `e^2.02 · <g(text_j), g(template)>`. The double sum is the product of a weighted image
    embedding and a weighted text embedding, so that a batch costs its crops' forward passes and one matrix product.

    Attributes:
        crops: N.
        alpha: smallest side of a crop, as a share of the image's shorter side; the largest is 0.9.
    """

    name: ClassVar[str] = "wca"
    random: ClassVar[bool] = True
    takes_own_texts: ClassVar[bool] = False

    crops: int = 60
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= LARGEST_CROP:
            raise UserError(f"wca:alpha={self.alpha} is a share of the image's side: give one in (0, {LARGEST_CROP}].")

    @property
    def cost(self) -> int:
        return 1 + self.crops

    def prompts(self, class_names: Sequence[str], template: str) -> list[list[str]]:
        """Return the descriptions of each class, and the template prompt that weights them."""
        own = zip(super().prompts(class_names, template), class_prompts(class_names, template), strict=True)
        return [[*texts, prompt] for texts, prompt in own]

    def classifier(self, clip: Clip, class_names: Sequence[str], template: str) -> ZeroShot:
        return CropsAgainstTexts(clip, class_names, self.needed_texts(class_names), template)

    def bind(self, classifier: ZeroShot, keys_B: Tensor, *, attacked: bool) -> ZeroShot:
        draws = rng.Draws(keys_B.to(classifier.clip.device), attacked=attacked)
        return WeightedCrops(classifier, draws, self.crops, self.alpha)


LARGEST_CROP = 0.9
IMAGE_WEIGHT, TEXT_WEIGHT = math.exp(4.0), math.exp(2.02)


class CropsAgainstTexts(SeveralPrompts):
    """WCA's text side. Its image side is random, so it is made for each batch (`WCA.bind`)."""

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        embedded_PD = self.embed_each(prompts)
        with torch.no_grad():
            template_KD = self.clip.embed_texts(class_prompts(self.class_names, self.template))
        similar_P = (embedded_PD * template_KD[self.owners]).sum(1)
        weight_P = (TEXT_WEIGHT * similar_P).exp()  # at most e^(e^2.02): no maximum need be subtracted
        weight_P = weight_P / (self.pool(weight_P[:, None]) * self.counts[:, None]).squeeze(1)[self.owners]
        return self.pool(weight_P[:, None] * embedded_PD) * self.counts[:, None]


class WeightedCrops(ImageViewWrapper):
    """WCA's image side, for one batch: an image's embedding is the weighted sum of its crops' embeddings."""

    deterministic = False

    def __init__(self, classifier: ZeroShot, draws: rng.Draws, crops: int, alpha: float) -> None:
        super().__init__(classifier)
        self._draws, self._crops, self._alpha = draws, crops, alpha

    def embed(self, pixels_BCHW: Tensor, index: Tensor | None = None, *, normalize: bool = True) -> Tensor:
        """Return `Σ_i w_i f(crop_i)`, `(B, D)`; it has no un-normalised form."""
        keys_B = self._draws.of(index, len(pixels_BCHW)).squeeze(1)
        crops = random_crops(pixels_BCHW, keys_B, self._crops, self._alpha, self.clip.image_size, self.clip.resize)
        crop_BND = self.clip.encode_image(crops.flatten(0, 1)).unflatten(0, (len(pixels_BCHW), self._crops))
        whole_BD = self.clip.encode_image(pixels_BCHW)
        weight_BN = (IMAGE_WEIGHT * (crop_BND * whole_BD[:, None]).sum(-1)).softmax(1)
        return (weight_BN[..., None] * crop_BND).sum(1)


def random_crops(
    pixels_BCHW: Tensor, keys_B: Tensor, crops: int, alpha: float, size: int, resize: Resize = "antialias"
) -> Tensor:
    """Return square crops, `(B, N, C, size, size)` in [0, 1]: side U(alpha, 0.9)·min(H, W), uniform positions, resized
    bicubically to the model's input size. Images whose shorter side exceeds `size` are first reduced to it, as `resize`
    says."""
    if min(pixels_BCHW.shape[-2:]) > size:
        height, width = (max(size, round(side * size / min(pixels_BCHW.shape[-2:]))) for side in pixels_BCHW.shape[-2:])
        antialias = resize == "antialias"
        pixels_BCHW = F.interpolate(pixels_BCHW, size=(height, width), mode="bicubic", antialias=antialias)
    height, width = pixels_BCHW.shape[-2:]
    drawn = rng.uniform(keys_B, (crops, 3), dtype=pixels_BCHW.dtype)
    side_BN = (alpha + (LARGEST_CROP - alpha) * drawn[..., 0]) * min(height, width)
    zero = torch.zeros_like(side_BN)
    # In coordinates of [-1, 1], point o on the crop shows the image's point share·o + offset.
    share_x, share_y = side_BN / width, side_BN / height
    offset_x, offset_y = ((2 * drawn[..., i] - 1) * (1 - share) for i, share in ((1, share_x), (2, share_y)))
    matrix = torch.stack((share_x, zero, offset_x, zero, share_y, offset_y), -1).view(-1, 2, 3)
    images = pixels_BCHW.repeat_interleave(crops, 0)
    grid = F.affine_grid(matrix, [len(images), images.shape[1], size, size], align_corners=False)
    warped = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return warped.clamp(0, 1).unflatten(0, (-1, crops))


def templates_of(kind: Literal["clip", "coop"], dataset: str) -> tuple[str, ...]:
    """Return the templates that CLIP or CoOp has for a data set: those for ImageNet if it has none of its own."""
    found = _templates()[kind].get(dataset)
    if kind == "coop":
        return (str(found or "a photo of a {}."),)
    return tuple(found or (make("{}") for make in _imagenet("openai")))


@cache
def _templates() -> Mapping[str, Mapping[str, str | list[str]]]:
    return tomllib.loads((resources.files("rayclip.models") / "templates.toml").read_text("utf-8"))


def _imagenet(kind: str) -> Sequence[Callable[[str], str]]:
    import open_clip

    return open_clip.SIMPLE_IMAGENET_TEMPLATES if kind == "simple" else open_clip.OPENAI_IMAGENET_TEMPLATES


SCORERS: Configurables[Scorer] = Configurables(
    "scorer", "scorers", Scorer, (Template, Ensemble, CuPL, WCA), option="--scorer", example="wca:crops=30"
)
DEFAULT = Template()


def parse_scorers(text: str) -> list[Scorer]:
    """Parse `"template,cupl:captions=FILE,wca:captions=FILE,crops=30"` into scorers, in that order.

    Raises:
        UserError: unknown scorer or setting, or an invalid value.
    """
    return SCORERS.parse(text)

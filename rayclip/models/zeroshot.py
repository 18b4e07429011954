"""Zero-shot classification: one text embedding per class, computed once per (model, class set) and reused.

Shapes: B batch, V views of an image, K classes, D embedding.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.models.clip import Clip

TEMPLATE = "This is a photo of a {}"  # no full stop: SAFT, TTC, MMCoA and TeCoA all use this one


def clean_name(name: str) -> str:
    """Return the name in lower case, with `_`, `-` and `/` as blanks: the papers' code does this to every class
    name."""
    return " ".join(name.lower().translate(str.maketrans("_-/", "   ")).split())


def find_faults(*logits_BK: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each way in which logits are no prediction, and of which samples any of them are so, bool `(B,)`: a model
    without predictions must not count as robust."""
    yield "logits that are not finite", torch.stack([~z.isfinite().all(1) for z in logits_BK]).any(0)
    yield "every class the same logit", torch.stack([z.amax(1) == z.amin(1) for z in logits_BK]).any(0)


def class_prompts(class_names: Sequence[str], template: str = TEMPLATE) -> list[str]:
    return [template.format(clean_name(name)) for name in class_names]


class ZeroShot:
    """A frozen CLIP as a classifier over `class_names`.

    `classifier(pixels)` returns logits; `embed` and `logits` are its two halves, so that an attack on several text sets
    pays for one image forward pass. A classifier behind a test-time defence (`defenses.Defended`) has the same
    interface: it may use several views of an image, and its randomness belongs to the samples, hence the `index` of
    each image in the batch that is being attacked. Without `index`, the images are taken to be the whole batch.

    Attributes:
        deterministic: whether the logits are a function of the pixels alone; attacks use that (`GradientAttack`).
    """

    deterministic: bool = True

    def __init__(self, clip: Clip, class_names: Sequence[str], template: str = TEMPLATE) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.class_names, self.template = tuple(class_names), clip.template or template
        self._start(class_prompts(class_names, self.template))

    def _start(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)
        self._embedded: tuple[Sequence[str], Tensor] | None = None
        with torch.no_grad():
            self.text_KD = self.embed_prompts(self.prompts)
            self._scale = self.clip.scale

    def embed_each(self, prompts: Sequence[str]) -> Tensor:
        """Return normalised embeddings of prompts, `(P, D)`. Those of the last list are cached, as every batch needs
        the same."""
        if self._embedded is None or self._embedded[0] is not prompts:
            with torch.no_grad():
                self._embedded = prompts, self.clip.embed_texts(prompts)
        return self._embedded[1]

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return text weights of the classes, `(K, D)`."""
        return self.weights(self.pool(self.embed_each(prompts)))

    def pool(self, values_PD: Tensor) -> Tensor:
        """Reduce values per prompt to values per class, `(K, D)`: here a class has one prompt."""
        return values_PD

    def weights(self, mean_KD: Tensor) -> Tensor:
        """Return text weights computed from the means of normalised embeddings."""
        return mean_KD

    @property
    def plain(self) -> "ZeroShot":
        """The classifier that a test-time defence queries, which must not be random."""
        return self

    def prompts_of(self, label: int) -> list[str]:
        return [self.prompts[label]]

    def with_clip(self, clip: Clip) -> Self:
        """Return the same classifier, with the same class weights, but with another model as its image encoder."""
        other = copy.copy(self)
        other.clip = clip
        return other

    def embed(self, pixels_BCHW: Tensor, index: Tensor | None = None, *, normalize: bool = True) -> Tensor:
        """Return image embeddings `(B, D)`; `(B, V, D)` for a classifier that uses several views.

        Args:
            index: position of each image in the batch; None if they are all of it, in order.
        """
        return self.clip.encode_image(pixels_BCHW, normalize=normalize)

    def logits(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        """Return `s · <f(x), t_c>`, `(B, K)`, against the clean class prompts unless other text weights are given. For
        several views, return the logarithm of their mean probabilities."""
        return self.decide(image_BD, self.scores(image_BD, text_KD))

    def logits_with_own(self, image_BD: Tensor, own_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return logits `(B, K)` in which each image's true class has its own text weights, the other classes their
        clean ones."""
        own = self._scale * (image_BD * per_view(own_BD, image_BD)).sum(-1)
        others = self.scores(image_BD)
        labels = per_view(labels_B[:, None], image_BD).expand(*own.shape, 1)
        return self.decide(image_BD, others.scatter(-1, labels, own[..., None]))

    def scores(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        """Return the logits of each view, `(B, K)` or `(B, V, K)`."""
        return self._scale * image_BD @ (self.text_KD if text_KD is None else text_KD).T

    def decide(self, image_BD: Tensor, scores: Tensor) -> Tensor:
        """Return the logits `(B, K)` of images, given those of their views."""
        return merge_views(scores)

    def __call__(self, pixels_BCHW: Tensor, index: Tensor | None = None) -> Tensor:
        return self.logits(self.embed(pixels_BCHW, index))


class SeveralPrompts(ZeroShot):
    """A frozen CLIP as a classifier whose classes have one or more prompts each: a class's weights are the normalised
    mean of the embeddings of its prompts.

    Attributes:
        prompts: of all classes, in a row.
        counts: number of prompts of each class, `(K,)`.
        owners: the class of each prompt, `(P,)`.
    """

    def __init__(
        self, clip: Clip, class_names: Sequence[str], texts: Sequence[Sequence[str]], template: str = TEMPLATE
    ) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.class_names, self.template = tuple(class_names), clip.template or template
        self._ends = list(itertools.accumulate(len(own) for own in texts))
        self.counts = torch.tensor([len(own) for own in texts], device=clip.device)
        self.owners = torch.arange(len(texts), device=clip.device).repeat_interleave(self.counts)
        self._start([text for own in texts for text in own])

    def pool(self, values_PD: Tensor) -> Tensor:
        """Return the mean over each class's prompts, `(K, D)`."""
        return torch.segment_reduce(values_PD, "mean", lengths=self.counts, axis=0)

    def weights(self, mean_KD: Tensor) -> Tensor:
        return F.normalize(mean_KD, dim=-1)

    def prompts_of(self, label: int) -> list[str]:
        return list(self.own(self.prompts, label))

    def own(self, texts: Sequence[str], label: int) -> Sequence[str]:
        """Return a class's part of texts that are in the order of the prompts."""
        return texts[self._ends[label - 1] if label else 0 : self._ends[label]]


class ImageViewWrapper(ZeroShot):
    """A classifier that shares another's texts but embeds images in its own way, possibly differently each time;
    subclasses define `embed`."""

    deterministic = False

    def __init__(self, inner: ZeroShot) -> None:
        vars(self).update(vars(inner))  # class weights and prompts
        self.inner = inner

    @property
    def plain(self) -> ZeroShot:
        return self.inner.plain

    def embed_each(self, prompts: Sequence[str]) -> Tensor:
        return self.inner.embed_each(prompts)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        return self.inner.embed_prompts(prompts)

    def pool(self, values_PD: Tensor) -> Tensor:
        return self.inner.pool(values_PD)

    def weights(self, mean_KD: Tensor) -> Tensor:
        return self.inner.weights(mean_KD)

    def prompts_of(self, label: int) -> list[str]:
        return self.inner.prompts_of(label)


def merge_views(logits: Tensor) -> Tensor:
    """Return logits `(B, K)` unchanged; for `(B, V, K)`, the logarithm of the views' mean softmax, `(B, K)`."""
    if logits.ndim == 2:
        return logits
    return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])


def per_view(rows_BX: Tensor, embedded: Tensor) -> Tensor:
    """Reshape values per image to broadcast over its views: `(B, 1, X)` if `embedded` is `(B, V, D)`, else
    unchanged."""
    return rows_BX[:, None] if embedded.ndim == 3 else rows_BX


def mean_over_views(values: Tensor) -> Tensor:
    """Return `(B,)` unchanged, `(B, V)` as the mean over the views."""
    return values if values.ndim == 1 else values.mean(1)

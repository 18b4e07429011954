"""SGA, the set-level guidance attack (Lu et al. 2023): attacks the text guided by the image, then the image guided by
its texts at several scales, then the text again guided by the adversarial image.

Shapes: B batch, A samples of it that are still being attacked, D embedding, M candidate sentences.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip import rng
from rayclip.attacks.base import Adversarial, GradientAttack, Prompts, Samples, mean_embeddings
from rayclip.attacks.bert import TextAttack, change_words, embed_as_read, rank_words
from rayclip.models import ZeroShot
from rayclip.models.zeroshot import mean_over_views, per_view
from rayclip.types import UserError

_FIRST_STREAM = 4  # of the noise; the random start uses lower ones


def text_gain(image_MD: Tensor, text_MD: Tensor) -> Tensor:
    """Return the gain that a change of text maximises: `-<f(x), t'>` of normalised embeddings, `(M,)` in float64."""
    return -(image_MD.double() * text_MD.double()).sum(-1)


def image_loss(views_SAD: Tensor, own_AD: Tensor) -> Tensor:
    """Return the loss that the image maximises: `-Σ_s mean_t' <f(view_s), t'>`, `(A,)`.

    Args:
        views_SAD: normalised embeddings of the image at every scale; `(S, A, V, D)` if a defence has several views.
        own_AD: mean of the normalised embeddings of the image's adversarial texts.
    """
    return -mean_over_views((views_SAD * per_view(own_AD, views_SAD[0])).sum(-1).sum(0))


def rescaled(pixels_ACHW: Tensor, scale: float, noise_ACHW: Tensor) -> Tensor:
    """Return the noisy image at another size, in [0, 1]; the model's own resize brings it to the model's input size."""
    height, width = (max(1, round(side * scale)) for side in pixels_ACHW.shape[-2:])
    noisy = pixels_ACHW + noise_ACHW
    return F.interpolate(noisy, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class SGA(TextAttack, GradientAttack):
    """Set-level guidance attack: every image gets its own adversarial texts, and its pixels move away from all of them.

    1. For each text of the image: of BERT-Attack's substitutes for a word, take the one farthest from the image.
    2. The image maximises `image_loss` with these texts.
    3. Repeat step 1, guided by the adversarial image instead of the clean one.

    For zero-shot classification an image's text is the prompt of its true class; the adversarial image is classified
    against that adversarial prompt and the clean prompts of all other classes, which are paired with no image. Under
    `first_success` an image whose clean pixels are already misclassified with its text of step 1 is not attacked; with
    one changed word, step 3 cannot undo a success. For retrieval an image's texts are its captions; all of them are
    changed, and all are candidates.

    Attributes:
        scales: of the views, 1 among them: that view is the image itself, without noise.
        noise: standard deviation of the other views' gaussian noise, in pixel units.
    """

    name: ClassVar[str] = "sga"
    gives_own_texts: ClassVar[bool] = True

    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    noise: float = 0.05

    def __post_init__(self) -> None:
        if 1 not in self.scales or min(self.scales) <= 0:
            raise UserError("sga: scales must be positive and 1 among them, as in scales=0.5+1+1.5.")

    def describe_prepared(self) -> dict[str, Any] | None:
        return None

    def prepare(self, victim: ZeroShot) -> Prompts:
        return None

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        images_BCHW, labels_B, keys_B, todo_B = samples
        wanted_B = torch.ones_like(labels_B) if todo_B is None else todo_B.long()
        labels, wanted = torch.stack((labels_B, wanted_B)).tolist()
        texts = _OwnTexts(self, victim, labels, [b for b, attacked in enumerate(wanted) if attacked])
        with torch.no_grad():
            clean_BD = victim.embed(images_BCHW)
        own_BD = mean_embeddings(victim, texts.guided_by(clean_BD))
        if self.stop == "first_success":
            holds_B = victim.logits_with_own(clean_BD, own_BD, labels_B).argmax(1) == labels_B
            samples = samples._replace(todo_B=holds_B if todo_B is None else todo_B & holds_B)
        keys_B, stream = keys_B.to(images_BCHW.device, non_blocking=True), itertools.count(_FIRST_STREAM, 2)

        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            views = []
            for scale in self.scales:
                view = pixels
                if scale != 1:
                    shape = tuple(pixels.shape[1:])
                    noise = rng.gaussian(keys_B[index], shape, stream=next(stream), dtype=pixels.dtype)
                    view = rescaled(pixels, scale, self.noise * noise)
                views.append(victim.embed(view, index))
            itself = views[self.scales.index(1)]
            broken = victim.logits_with_own(itself, own_BD[index], labels_B[index]).argmax(1) != labels_B[index]
            return image_loss(torch.stack(views), own_BD[index]), broken

        images, steps, queries = self.ascend(forward, samples, eps=eps)
        with torch.no_grad():
            adversarial_BD = victim.embed(images)
        own = texts.guided_by(adversarial_BD)
        return Adversarial(images, None, steps, queries * len(self.scales), own_texts=own)


class _OwnTexts:
    """The texts of a batch's images, ranked once and used both times that an image guides them."""

    def __init__(self, attack: SGA, victim: ZeroShot, labels: Sequence[int], attacked: Sequence[int]) -> None:
        self._changes, source = attack.changes, attack.source(victim.clip)
        self._texts = [tuple(victim.prompts_of(label)) for label in labels]
        flat = [(b, text) for b in attacked for text in self._texts[b]]
        distinct = list(dict.fromkeys(text for _, text in flat))
        # Of one changed word, both times try the same sentences
        self._embed = lru_cache(maxsize=1)(partial(embed_as_read, victim.clip, source))
        ranked = dict(zip(distinct, rank_words(victim.clip, distinct, source), strict=True))
        self._owners = [b for b, _ in flat]
        self._ranked = [ranked[text] for _, text in flat]

    def guided_by(self, image_BD: Tensor) -> tuple[tuple[str, ...], ...]:
        """Return each image's texts, changed if the image is attacked."""
        image_BD = image_BD if image_BD.ndim == 2 else image_BD.mean(1)
        owners = torch.tensor(self._owners, dtype=torch.int64).to(image_BD.device, non_blocking=True)

        def gain(owners_M: Tensor, text_MD: Tensor) -> Tensor:
            return text_gain(image_BD[owners[owners_M]], text_MD)

        changed = change_words(self._ranked, self._embed, gain, self._changes)
        new: dict[int, list[str]] = {}
        for b, change in zip(self._owners, changed, strict=True):
            new.setdefault(b, []).append(change.prompt)
        return tuple(tuple(new.get(b, own)) for b, own in enumerate(self._texts))

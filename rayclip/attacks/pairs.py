"""Attacks on image-caption pairs, for retrieval: pairs are attacked as a classifier in which every image is a class.

Class i is image i, its prompts are the image's captions, and its text weights their mean embedding: the logit of image
j for class i is s times the mean similarity of j with i's captions. So PGD's loss is the cross-entropy of an image over
the captions of all images, where its own are correct; what Sep-Attack, Co-Attack and SGA do with the prompt of the true
class they do with the image's captions. The classes are those of the whole set, so a result does not depend on the
batch.

Shapes: I images of the set, B of a batch, T captions of the set, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rayclip.attacks.base import Attack, Prompts, Samples
from rayclip.attacks.registry import ATTACKS
from rayclip.models import Clip
from rayclip.models.zeroshot import SeveralPrompts
from rayclip.names import not_for_pairs
from rayclip.types import UserError


class PairVictim(SeveralPrompts):
    """A frozen CLIP as a classifier over images: `captions[i]` are the prompts of class i, at least one. Its weights
    are the mean of their embeddings without normalisation, as retrieval compares with every caption."""

    def __init__(self, clip: Clip, captions: Sequence[Sequence[str]]) -> None:
        super().__init__(clip, [str(i) for i in range(len(captions))], captions)

    def weights(self, mean_KD: Tensor) -> Tensor:
        return mean_KD


class AdversarialPairs(NamedTuple):
    """Adversarial images `(B, C, H, W)` in [0, 1], and the captions of each."""

    images_BCHW: Tensor
    captions: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class PairAttack:
    """An attack bound to a set of pairs.

    Attributes:
        keys_I: one 64-bit key per image (`rng.sample_keys`).
        prompts: the result of `attack.prepare(victim)`.
        eps: budget in pixel units; ignored by attacks that leave the image unchanged.
    """

    attack: Attack
    victim: PairVictim
    keys_I: Tensor
    prompts: Prompts
    eps: float

    def __call__(self, images_BCHW: Tensor, first: int) -> AdversarialPairs:
        """Attack the images `first`, `first + 1`, … of the set and their captions."""
        places = range(first, first + len(images_BCHW))
        labels_B = torch.arange(first, places.stop, device=images_BCHW.device)
        samples = Samples(images_BCHW, labels_B, self.keys_I[first : places.stop])
        with torch.enable_grad():
            result = self.attack.run(self.victim, samples, eps=self.eps, prompts=self.prompts)
        texts = self.victim.prompts if self.prompts is None else self.prompts
        captions = result.own_texts or [tuple(self.victim.own(texts, i)) for i in places]
        return AdversarialPairs(result.images_BCHW, list(captions))


def check_for_pairs(attack: Attack) -> None:
    """Raise a `UserError` unless the attack can run on pairs."""
    if not attack.for_pairs:
        raise not_for_pairs(attack.name, (name for name, kind in ATTACKS.items() if kind.for_pairs))
    if getattr(attack, "stop", "final") != "final":
        raise UserError(
            f"attack '{attack.name}' with stop=first_success has nothing to stop at in retrieval, where an image is "
            "neither right nor wrong: use stop=final."
        )

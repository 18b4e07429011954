"""LEAF (Abad Rocamora et al., NeurIPS 2025, arXiv 2506.03355): FARE's loss on texts with changed characters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rayclip import rng
from rayclip.attacks.charmer import CHARACTERS, Search, known_words
from rayclip.attacks.feature import feature_distance
from rayclip.methods.base import OWN, SMALL_MODEL, Batch, Recipe, Trains
from rayclip.methods.captioned import CaptionedMethod
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip, class_prompts
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class LEAF(CaptionedMethod):
    """`‖g(S') − g₀(S)‖²` on un-normalised embeddings of texts S and of S', S with changed characters; batch mean.

    The image encoder stays as it is. S' is the text within k edits that a random search finds to maximise the same
    (algorithm 1): a blank is tried at rho random places, and where it moves the embedding farthest, rho random
    characters; if none moves it farther, S stays.

    S is each image's class prompt, or with `captions` one of its class's, drawn anew every time. Each image draws its
    own edits, so that a batch holds many edits of few texts. The paper trains on 80,000 captions; from ten prompts the
    model learns to read these and their edits alone.

    Attributes:
        k: edits, one after the other.
        rho: places, and characters, tried per edit; all places if there are fewer. The paper's 50 are nearly all of a
            class prompt, where the same one then wins every time: rho=10 made stronger models of the digits.
        constrain: see `attacks.charmer.Charmer`; the published models were trained so.
    """

    name: ClassVar[str] = "leaf"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adamw", lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-4, warmup_steps=1400, batch_size=128, epochs=30
    )
    published: ClassVar[Mapping[str, Any]] = {"constrain": True}
    # Chosen as SMALL_MODEL was: with few prompts, steps count and not the images of each
    small: ClassVar[Recipe] = replace(SMALL_MODEL, batch_size=32, epochs=30)
    needs_original: ClassVar[bool] = True

    k: int = 1
    rho: int = 50
    constrain: bool = False
    trains: Trains = "text"

    @classmethod
    def uses_attack(cls) -> bool:
        return False

    @property
    def texts_per_class(self) -> int:
        return self.sets if self.has_captions else 1

    def prompts(self, class_names: Sequence[str], template: str) -> list[str]:
        return super().prompts(class_names, template) if self.has_captions else class_prompts(class_names, template)

    def check(self, clip: Clip) -> None:
        if self.part != "text":
            raise UserError("leaf knows no images and trains the text encoder alone: use --trains text.")
        super().check(clip)
        known_words(clip, self.constrain)

    def check_attack(self) -> None:
        if self.against != OWN:
            raise UserError("leaf trains on texts, whose attack has no other objective: leave --attack away.")

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        assert batch.original is not None
        keys_B, prompts, several = batch.keys_B.cpu(), batch.texts.prompts, self.texts_per_class
        sets_B = (rng.uniform(keys_B, (), stream=2 * self.k) * several).long()
        chosen_B = sets_B * (len(prompts) // several) + batch.labels_B.cpu()
        texts = [prompts[i] for i in chosen_B.tolist()]
        with torch.no_grad(), torch.autocast(clip.device.type, enabled=False):
            original_BD = batch.original.clip.embed_texts(texts, normalize=False)
        words = known_words(clip, self.constrain)
        search = Search(clip=clip, anchor_PD=original_BD, objective="squared", words=words)
        for turn in range(self.k):
            places = self._draw(keys_B, [2 * len(text) + 1 for text in texts], 2 * turn)
            characters = self._draw(keys_B, [len(CHARACTERS)] * len(texts), 2 * turn + 1)
            texts = search.step(texts, places, 1, [[CHARACTERS[i] for i in own] for own in characters])
        return replace(batch, adversarial_texts=texts, original_BD=original_BD)

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.original_BD is not None and batch.adversarial_texts is not None
        text_BD = clip.embed_texts(batch.adversarial_texts, normalize=False)
        loss = global_mean(feature_distance(batch.original_BD, text_BD, "squared"), batch.total)
        return loss, {"loss": loss.detach()}

    def _draw(self, keys_B: Tensor, counts: Sequence[int], stream: int) -> list[list[int]]:
        """Return rho random numbers below each sample's count, all different; all there are if it is lower."""
        values = rng.uniform(keys_B, (max(counts),), stream=stream)
        return [
            row[:count].argsort(stable=True)[: self.rho].tolist() for row, count in zip(values, counts, strict=True)
        ]

"""LEAF (Abad Rocamora et al., NeurIPS 2025, arXiv 2506.03355): FARE's loss on texts with changed characters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rayclip import rng
from rayclip.attacks.charmer import CHARACTERS, Search, known_words
from rayclip.attacks.feature import feature_distance
from rayclip.methods.base import OWN, Batch, Method, Present, Recipe, Trains
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class LEAF(Method):
    """`‖g(S') − g₀(S)‖²` on un-normalised text embeddings, batch mean; S is the class prompt of each image, S' the text
    within k edits that a random search found to maximise the same (algorithm 1). The image encoder stays as it is.

    An edit: a blank is tried at rho random places of S, and where it moves the embedding farthest, rho random
    characters; S itself stays if none moves it farther. Every image draws for its own, so that a batch holds many edits
    of few prompts. The papers' data are 80,000 captions; with class prompts the model learns to read these alone.

    Attributes:
        k: edits, one after the other.
        rho: places, and characters, tried per edit; if S has fewer places, all are.
        constrain: see `attacks.charmer.Charmer`; the published models were trained so.
    """

    name: ClassVar[str] = "leaf"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adamw", lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-4, warmup_steps=1400, batch_size=128, epochs=30
    )
    published: ClassVar[Mapping[str, Any]] = {"constrain": True}
    needs_original: ClassVar[bool] = True

    k: int = 1
    rho: int = 50
    constrain: bool = False
    trains: Trains = "text"

    @classmethod
    def uses_attack(cls) -> bool:
        return False

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
        present = Present.among(batch.labels_B)
        prompts = [batch.texts.prompts[c] for c in present.labels]
        with torch.no_grad(), torch.autocast(clip.device.type, enabled=False):
            original_BD = batch.original.clip.embed_texts(prompts, normalize=False)[present.places_B]
        words = known_words(clip, self.constrain)
        search = Search(clip=clip, anchor_PD=original_BD, objective="squared", words=words)
        keys_B, texts = batch.keys_B.cpu(), [prompts[i] for i in present.places_B.tolist()]
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

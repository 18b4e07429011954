"""MMCoA (arXiv 2404.19287): multimodal contrastive adversarial training.

Aligns adversarial images with clean texts, and adversarial texts with clean images (equations 7 to 9).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rayclip.attacks.bert import DEFAULT, TextSettings
from rayclip.methods.base import Batch, Method, Present, Recipe
from rayclip.methods.losses import Targets, contrastive
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class MMCoA(Method):
    """`λ_img · L(f(x'), t) + λ_txt · L(f(x), t')` with L contrastive inside the batch, in both directions; of a SigLIP,
    its sigmoid loss, whose bias is trained too (`losses.contrastive`).

    The image attack raises the contrastive loss, as the paper has it (`against=own`); the published code raises CE over
    the class prompts (`against=pgd`).

    Attributes:
        lambda_img, lambda_txt: the two weights; the ablations set one to 0 and skip its attack.
        targets: `diagonal` (reference code) or `class` (equation 7); see `losses.contrastive`.
        text: BERT-Attack's settings for the adversarial texts, made once per class present in the batch.
    """

    name: ClassVar[str] = "mmcoa"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adam", lr=1e-6, betas=(0.9, 0.98), adam_eps=1e-6, weight_decay=0.2, schedule="constant", epochs=30
    )
    published: ClassVar[Mapping[str, Any]] = {"against": "pgd"}

    lambda_img: float = 0.5
    lambda_txt: float = 0.5
    targets: Targets = "diagonal"
    text: TextSettings = field(default_factory=TextSettings)

    def __post_init__(self) -> None:
        if not (self.lambda_img or self.lambda_txt):
            raise UserError("mmcoa with lambda_img and lambda_txt 0 has no loss: make one of them positive.")

    @property
    def compares_samples(self) -> bool:
        return True

    def with_default_substitutes(self, substitutes: str) -> Self:
        if self.text.substitutes != DEFAULT:
            return self
        return replace(self, text=self.text.with_substitutes(substitutes))

    def count_cut(self, clip: Clip, texts: Sequence[str]) -> int:
        return self.text.count_cut(clip, texts)

    def parameters(self, clip: Clip) -> list[nn.Parameter]:
        bias = clip.bias if self.trains == "all" else None
        return super().parameters(clip) + ([] if bias is None else [bias])

    def check(self, clip: Clip) -> None:
        super().check(clip)
        if self.lambda_txt:
            self.text.source(clip)

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        # Waits for the device here, before the attack on the images fills it: the host then prepares the texts beside
        # that attack
        present = Present.among(batch.labels_B)
        batch = replace(batch, present=present)
        if self.lambda_img:
            with torch.no_grad():
                text_BD = batch.texts.of(present)
            batch = self.perturb(
                clip,
                batch,
                lambda pixels: contrastive(
                    clip.encode_image(pixels),
                    text_BD,
                    batch.labels_B,
                    clip.scale,
                    batch.total,
                    self.targets,
                    clip.bias,
                ),
            )
        if self.lambda_txt:
            with torch.autocast(clip.device.type, enabled=False):  # which words are nearest, bf16 cannot tell
                changes = self.text.attack(clip, [batch.texts.prompts[c] for c in present.labels])
            made = {c: change.prompt for c, change in zip(present.labels, changes, strict=True)}
            batch = replace(batch, adversarial_prompts=made)
        return batch

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        terms: dict[str, Tensor] = {}
        present = batch.present or Present.among(batch.labels_B)
        if self.lambda_img:
            assert batch.adversarial_BCHW is not None
            image_BD, text_BD = clip.encode_image(batch.adversarial_BCHW), batch.texts.of(present)
            terms["loss_image"] = self._mean(clip, batch, image_BD, text_BD)
        if self.lambda_txt:
            assert batch.adversarial_prompts is not None
            text_CD = clip.embed_texts([batch.adversarial_prompts[c] for c in present.labels])
            image_BD, text_BD = clip.encode_image(batch.pixels_BCHW), text_CD[present.places_B]
            terms["loss_text"] = self._mean(clip, batch, image_BD, text_BD)
        weights = {"loss_image": self.lambda_img, "loss_text": self.lambda_txt}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def _mean(self, clip: Clip, batch: Batch, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        terms_B = contrastive(image_BD, text_BD, batch.labels_B, clip.scale, batch.total, self.targets, clip.bias)
        return global_mean(terms_B, batch.total)

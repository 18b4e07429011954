"""Base of the attacks on both modalities whose texts do not depend on the image: BERT-Attack first, then the image.

Shapes: B batch, K classes, D embedding, P prompts; A the samples of a batch that are still being attacked.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayclip.attacks.base import Adversarial, GradientAttack, Prompts, Samples
from rayclip.attacks.bert import TextAttack
from rayclip.models import ZeroShot

# (pixels_ACHW, indices_A into the batch) -> (features_AD, normalised; loss_A to raise)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class JointAttack(TextAttack, GradientAttack):
    """Adversarial texts for all classes, and adversarial images; subclasses choose the image's loss.

    Adversarial images are classified against the adversarial texts. Under `first_success`, an image whose clean pixels
    are already misclassified against these texts is not attacked.
    """

    @abstractmethod
    def objective(self, victim: ZeroShot, samples: Samples, text_PD: Tensor) -> Objective:
        """Return the image's objective; `text_PD` are the normalised embeddings of the adversarial prompts."""

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        assert prompts is not None, "call prepare first"
        text_PD = victim.embed_each(prompts)
        text_KD = victim.embed_prompts(prompts)
        if self.stop == "first_success":
            with torch.no_grad():
                holds_B = victim.logits(victim.embed(samples.images_BCHW), text_KD).argmax(1) == samples.labels_B
            samples = samples._replace(todo_B=holds_B if samples.todo_B is None else samples.todo_B & holds_B)
        objective = self.objective(victim, samples, text_PD)

        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            features, loss = objective(pixels, index)
            return loss, victim.logits(features, text_KD).argmax(1) != samples.labels_B[index]

        images, steps, queries = self.ascend(forward, samples, eps=eps, constant=victim.deterministic)
        return Adversarial(images, text_KD, steps, queries)

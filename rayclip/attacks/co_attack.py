"""Co-Attack (Zhang, Yi and Sang 2022): attacks the text first, then moves the image away from its clean embedding and
from the adversarial text.

Shapes: A images that are being attacked, K classes, D embedding, P prompts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.attacks.base import Samples
from rayclip.attacks.bert import divergence
from rayclip.attacks.joint import JointAttack, Objective
from rayclip.models import ZeroShot
from rayclip.models.zeroshot import mean_over_views, per_view


def co_attack_loss(image_AD: Tensor, clean_AD: Tensor, text_AD: Tensor, text_weight: float = 3.0) -> Tensor:
    """Return `KL(softmax e ‖ softmax e') + text_weight · KL(p ‖ softmax e')`, float64 `(A,)`; `(A, V)` for V views.

    All embeddings are normalised, as the CLIP models inside Co-Attack's and MMCoA's code return them: the softmax of
    raw embeddings is nearly one-hot, and the first term then drowns the second.

    Args:
        image_AD: embeddings e' of the adversarial images.
        clean_AD: embeddings e of the clean ones.
        text_AD: distributions p = softmax t' of the adversarial texts. For an image with several texts, the mean of
            their distributions: the divergence from the mean has the same gradient as the mean of the divergences.
    """
    return divergence(clean_AD, image_AD) + text_weight * divergence(text_AD.log(), image_AD)


@dataclass(frozen=True, kw_only=True)
class CoAttack(JointAttack):
    """Co-Attack: BERT-Attack on every prompt; the image maximises `co_attack_loss` with the adversarial text of its
    true class (for retrieval: its own adversarial captions). Adversarial images are classified against adversarial
    texts.

    The defaults are the paper's for classification; for retrieval it uses 10 steps of 1.25·eps/steps at 2/255. Its code
    starts in the positive half of the ball, U(0, eps); from the same start the images are equal pixel by pixel.

    Attributes:
        text_weight: weight of the divergence from the text.
    """

    name: ClassVar[str] = "co-attack"

    steps: int = 100
    text_weight: float = 3.0

    def objective(self, victim: ZeroShot, samples: Samples, text_PD: Tensor) -> Objective:
        own_BD = victim.pool(text_PD.softmax(-1))[samples.labels_B]
        with torch.no_grad():
            clean_BD = victim.embed(samples.images_BCHW)

        def climb(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            features = victim.embed(pixels, index)
            loss = co_attack_loss(features, clean_BD[index], per_view(own_BD[index], features), self.text_weight)
            return features, mean_over_views(loss)

        return climb

"""Co-Attack (Zhang, Yi and Sang 2022): text first, then an image that leaves its clean self and that text.

Shapes: A images that are being attacked, K classes, D embedding, P prompts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Samples
from rayclip.attacks.bert import divergence
from rayclip.attacks.joint import JointAttack, Objective
from rayclip.models import ZeroShot
from rayclip.models.zeroshot import mean_over_views, per_view


def co_attack_loss(raw_AD: Tensor, clean_AD: Tensor, text_AD: Tensor, text_weight: float = 3.0) -> Tensor:
    """`KL(softmax e ‖ softmax e') + text_weight · KL(p ‖ softmax e'/‖e'‖)`, float64 `(A,)`, `(A, V)` of views.

    Args:
        raw_AD: un-normalised embeddings e' of the adversarial images.
        clean_AD: un-normalised embeddings e of the clean ones.
        text_AD: distributions p = softmax t' of the normalised adversarial texts. Of an image with several texts the
            mean of theirs: the divergence from the mean has the same gradient as the mean of the divergences.
    """
    return divergence(clean_AD, raw_AD) + text_weight * divergence(text_AD.log(), F.normalize(raw_AD, dim=-1))


@dataclass(frozen=True, kw_only=True)
class CoAttack(JointAttack):
    """BERT-Attack on every prompt; the image climbs `co_attack_loss` with the adversarial text of its true class (for
    retrieval: its own adversarial captions). Judged adversarial image against adversarial texts.

    The defaults are the paper's for classification; for retrieval it takes 10 steps of 1.25·eps/steps in 2/255.

    Attributes:
        text_weight: of the divergence from the text.
    """

    name: ClassVar[str] = "co-attack"

    steps: int = 100
    text_weight: float = 3.0

    def objective(self, victim: ZeroShot, samples: Samples, text_PD: Tensor) -> Objective:
        own_BD = victim.pool(text_PD.softmax(-1))[samples.labels_B]
        with torch.no_grad():
            clean_BD = victim.embed(samples.images_BCHW, normalize=False)

        def climb(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            raw = victim.embed(pixels, index, normalize=False)
            loss = co_attack_loss(raw, clean_BD[index], per_view(own_BD[index], raw), self.text_weight)
            return F.normalize(raw, dim=-1), mean_over_views(loss)

        return climb

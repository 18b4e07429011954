"""The feature attack: moves the image embedding away from the clean one. Needs neither labels nor texts.

Shapes: A samples being attacked, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Adversarial, GradientAttack, Prompts, Samples
from rayclip.models import Clip, ZeroShot
from rayclip.models.exact import widened
from rayclip.models.zeroshot import mean_over_views
from rayclip.types import UserError

Objective = Literal["squared", "kl"]


def feature_distance(clean_AD: Tensor, other_AD: Tensor, objective: Objective) -> Tensor:
    """Return the distance of un-normalised embeddings from the clean ones, `(A,)`; with several views, their mean.

    `squared`: ‖other − clean‖² (FARE, TTC). `kl`: KL(softmax clean ‖ softmax other) over the embedding axis (AdvPT).
    """
    clean_AD, other_AD = widened(clean_AD), widened(other_AD)
    if objective == "squared":
        return mean_over_views((other_AD - clean_AD).square().sum(-1))
    log_clean = clean_AD.log_softmax(-1)
    return mean_over_views((log_clean.exp() * (log_clean - other_AD.log_softmax(-1))).sum(-1))


@dataclass(frozen=True, kw_only=True)
class FeatureAttack(GradientAttack):
    """Feature attack: maximises the distance between the un-normalised embeddings f(x + d) and f(x); the result is
    classified by the class prompts like that of every other attack.

    The clean embedding costs one more query per sample.

    Attributes:
        objective: see `feature_distance`.
        start: only `random`: at d = 0 the distance is at its minimum and its gradient vanishes.
    """

    name: ClassVar[str] = "feature"
    for_training: ClassVar[bool] = True

    objective: Objective = "squared"

    def __post_init__(self) -> None:
        if self.start == "zero":
            raise UserError("feature:start=zero cannot work, as the gradient vanishes there: use start=random.")

    def training_objective(
        self, clip: Clip, images_BCHW: Tensor, labels_B: Tensor, texts: Callable[[], Tensor], texts_per_class: int
    ) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean_BD = clip.encode_image(images_BCHW, normalize=False)
        return lambda pixels: feature_distance(clean_BD, clip.encode_image(pixels, normalize=False), self.objective)

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        images = samples.images_BCHW
        todo_B = torch.ones_like(samples.labels_B, dtype=torch.bool) if samples.todo_B is None else samples.todo_B
        at = todo_B.nonzero().squeeze(1)
        if not len(at):
            return Adversarial.untouched(images)
        place_B = todo_B.cumsum(0) - 1  # index of a sample among those to attack
        with torch.no_grad():
            clean_AD = victim.embed(images[at], at, normalize=False)

        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            features = victim.embed(pixels, index, normalize=False)
            broken = victim.logits(F.normalize(features, dim=-1)).argmax(1) != samples.labels_B[index]
            return feature_distance(clean_AD[place_B[index]], features, self.objective), broken

        adversarial, steps, queries = self.ascend(forward, samples, eps=eps, constant=victim.deterministic)
        return Adversarial(adversarial, None, steps, queries + todo_B)

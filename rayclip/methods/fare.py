"""FARE (Schlarmann et al., ICML 2024): robust image features, trained without labels or texts."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor

from rayclip.attacks.base import GradientAttack
from rayclip.attacks.feature import feature_distance
from rayclip.attacks.geometry import steepest
from rayclip.attacks.pgd import PGD
from rayclip.methods.base import Batch, Method, Recipe, Trains
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class _MomentumPGD(PGD):
    momentum: float

    def follow(self, direction: Tensor, gradient: Tensor) -> Tensor:
        return steepest(self.momentum * direction + steepest(gradient, self.norm), self.norm)


@dataclass(frozen=True, kw_only=True)
class FARE(Method):
    """`‖f(x') − f₀(x)‖²` on un-normalised features, on images that PGD made by maximising the same distance.

    The paper trains with 10 steps at 2/255 or 4/255, for 2 epochs of ImageNet: 20,000 steps, 1400 of them warm-up.

    Attributes:
        attack_momentum: of PGD: `v <- u(momentum·v + u(gradient))` with u the steepest direction of the ball, which is
            the sign in l_inf: there it only moves pixels whose gradient is exactly 0.
    """

    name: ClassVar[str] = "fare"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adamw", lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-4, warmup_steps=1400, batch_size=128, epochs=2
    )
    needs_original: ClassVar[bool] = True

    eps: float = 4 / 255
    steps: int = 10
    attack_momentum: float = 0.9
    trains: Trains = "image"

    def __post_init__(self) -> None:
        if self.trains_texts:
            raise UserError(f"{self.name} knows no texts and cannot train the text encoder: use --trains image.")

    def image_attack(self) -> GradientAttack:
        plain = super().image_attack()
        return _MomentumPGD(momentum=self.attack_momentum, **{f.name: getattr(plain, f.name) for f in fields(plain)})

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        assert batch.original is not None
        original_BD = batch.original.encode_image(batch.pixels_BCHW, normalize=False)
        return self.perturb(
            clip,
            replace(batch, original_BD=original_BD),
            lambda pixels: feature_distance(original_BD, clip.encode_image(pixels, normalize=False), "squared"),
        )

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.original_BD is not None and batch.adversarial_BCHW is not None
        image_BD = clip.encode_image(batch.adversarial_BCHW, normalize=False)
        loss = global_mean(feature_distance(batch.original_BD, image_BD, "squared"), batch.total)
        return loss, {"loss": loss.detach()}

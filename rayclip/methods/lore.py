"""LORE (arXiv 2505.18884): FARE under the constraint that clean features stay near the original model's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rayclip.attacks.feature import feature_distance
from rayclip.methods.base import Batch
from rayclip.methods.fare import FARE
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip


@dataclass(frozen=True, kw_only=True)
class LORE(FARE):
    """`‖f(x') − f₀(x)‖² + λ(x)·(‖f(x) − f₀(x)‖² − rho·‖f₀(x)‖²)`, on FARE's images. The model lowers it, and λ, a
    network on f₀(x), raises it (dual ascent): λ grows where the constraint is broken. Features are un-normalised.

    λ has two layers and a softplus. Model and λ take one step each, with the same optimiser; the paper takes a step of
    λ after K steps of the model.

    Attributes:
        rho: how far clean features may move, as a share of their squared length.
        hidden: width of λ.
    """

    name: ClassVar[str] = "lore"

    rho: float = 0.1
    hidden: int = 512

    def auxiliary(self, clip: Clip, seed: int) -> nn.Module:
        dimension = int(clip.config["model_cfg"]["embed_dim"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = nn.Linear(dimension, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1), nn.Softplus()
        return nn.Sequential(*layers, nn.Flatten(0))

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.original_BD is not None and batch.adversarial_BCHW is not None and batch.auxiliary is not None
        anchor_BD, multiplier_B = batch.original_BD, batch.auxiliary(batch.original_BD)
        adversarial_B = self._moved(clip, batch.adversarial_BCHW, anchor_BD)
        excess_B = self._moved(clip, batch.pixels_BCHW, anchor_BD) - self.rho * anchor_BD.square().sum(1)
        held = multiplier_B.detach()
        # The last term is zero; its gradient makes the optimiser, which descends, raise the multiplier
        terms_B = adversarial_B + held * excess_B + (held - multiplier_B) * excess_B.detach()
        means = {"loss": terms_B, "loss_adversarial": adversarial_B, "excess": excess_B, "multiplier": multiplier_B}
        found = {name: global_mean(term_B, batch.total) for name, term_B in means.items()}
        return found["loss"], {name: mean.detach() for name, mean in found.items()}

    @staticmethod
    def _moved(clip: Clip, pixels_BCHW: Tensor, anchor_BD: Tensor) -> Tensor:
        return feature_distance(anchor_BD, clip.encode_image(pixels_BCHW, normalize=False), "squared")

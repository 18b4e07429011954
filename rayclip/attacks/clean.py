"""No attack at all: the column that every table starts from."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayclip.attacks.base import Adversarial, Attack
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    name: ClassVar[str] = "clean"
    needs_eps: ClassVar[bool] = False

    def run(
        self,
        victim: ZeroShot,
        images_BCHW: Tensor,
        labels_B: Tensor,
        todo_B: Tensor,
        *,
        eps: float,
        keys_B: Tensor,
        prompts: tuple[str, ...] | None = None,
    ) -> Adversarial:
        return Adversarial.untouched(images_BCHW)

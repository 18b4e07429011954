"""LoRA (Hu et al. 2022, arXiv 2106.09685): train low-rank changes of weights, W = W0 + (alpha/rank)·B·A.

peft makes the factors and their products. The model itself stays as it is, with W written into its weights after each
step, and the gradient of W passed on to A and B. So attacks, losses, faster forward passes and checkpoints see an
ordinary model. It saves the optimiser's memory, not that of the gradients.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rayclip.models.clip import Clip
from rayclip.types import UserError

_NAME = "default"  # of peft's adapter
_EXAMPLE = "lora:rank=8,alpha=16,part=image"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Settings of LoRA.

    Attributes:
        rank: of the factors.
        alpha: alpha/rank scales the product of the factors; None is twice the rank.
        part: of the model (`Clip.parameters_of`), whose linear layers and attention they are added to.
    """

    rank: int
    alpha: float | None = None
    part: str

    @classmethod
    def parse(cls, text: str, part: str) -> "LoraSettings | None":
        """Parse `lora:rank=8,alpha=16,part=image`, with this default for the part; None if the text is another part.

        Raises:
            UserError: an unknown setting, or a value that is no positive number.
        """
        kind, _, rest = text.partition(":")
        if kind != "lora":
            return None
        values = dict(setting.partition("=")[::2] for setting in rest.split(",") if setting)
        try:
            rank, alpha = int(values.pop("rank", 8)), float(values.pop("alpha", 0)) or None
        except ValueError:
            rank, alpha = 0, None
        found = cls(rank=rank, alpha=alpha, part=values.pop("part", part))
        if values or rank < 1 or not (alpha is None or 0 < alpha < math.inf):
            raise UserError(f"trains '{text}' is not understood: write {_EXAMPLE}.")
        return found


class Lora:
    """Factors A and B of weights of a model, which holds W0 + (alpha/rank)·B·A from now on.

    Attributes:
        factors: to train; B is 0 at first.
    """

    def __init__(self, clip: Clip, settings: LoraSettings, seed: int) -> None:
        """
        Args:
            seed: of the random numbers in A.

        Raises:
            UserError: the part has no linear layers.
        """
        from peft import LoraConfig, inject_adapter_in_model

        names = layers_of(clip, settings.part)
        alpha = settings.alpha or 2 * settings.rank
        # A copy of the modules, with the same weights: peft puts its own layers in their place
        copied = copy.deepcopy(clip.model, {id(p): p for p in clip.model.parameters()})
        with torch.random.fork_rng([clip.device] if clip.device.type == "cuda" else []):
            torch.manual_seed(seed)
            config = LoraConfig(r=settings.rank, lora_alpha=cast(int, alpha), target_modules=names)
            copied = inject_adapter_in_model(config, copied, adapter_name=_NAME)
        self._layers = [layer for name in names for layer in _with_output(copied.get_submodule(name))]
        self._weights = [weight for name in names for weight in _weights_of(clip.model.get_submodule(name))]
        self._base = [weight.detach().clone() for weight in self._weights]
        self.factors = [p for layer in self._layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]
        for weight in self._weights:
            weight.requires_grad_(True)

    def take_gradients(self) -> None:
        """Pass the gradients of the model's weights on to the factors."""
        gradients = [cast(Tensor, weight.grad) for weight in self._weights]
        torch.autograd.backward(self._changes(), gradients)
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        """Write the factors' product into the model's weights."""
        for weight, base, change in zip(self._weights, self._base, self._changes(), strict=True):
            weight.copy_(base + change)

    def _changes(self) -> list[Tensor]:
        return [layer.get_delta_weight(_NAME) for layer in self._layers]


def check_lora(clip: Clip, settings: LoraSettings) -> None:
    """Raise a `UserError` if LoRA cannot train the part of a model that its settings name, or peft is not installed."""
    from importlib.util import find_spec

    layers_of(clip, settings.part)
    if find_spec("peft") is None:
        raise UserError("LoRA needs the package peft: pip install 'rayclip[lora]', on every node.")


def layers_of(clip: Clip, part: str) -> list[str]:
    """Return the names of the linear layers and attentions whose weights belong to a part of the model. Raise a
    `UserError` if there are none."""
    chosen = {id(p) for p in clip.parameters_of(part)}
    found: list[str] = []
    for name, module in clip.model.named_modules():
        inside = any(name.startswith(f"{above}.") for above in found)  # an attention's own output layer
        is_layer = isinstance(module, nn.Linear) or (isinstance(module, nn.MultiheadAttention) and _is_one(module))
        if is_layer and not inside and all(id(weight) in chosen for weight in _weights_of(module)):
            found.append(name)
    if not found:
        raise UserError(f"part {part} of '{clip.spec}' has no linear layers for LoRA: leave lora away.")
    return found


def _is_one(attention: nn.MultiheadAttention) -> bool:
    return cast(Any, attention).in_proj_weight is not None


def _weights_of(module: Any) -> Sequence[nn.Parameter]:
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight, cast(nn.Parameter, module.out_proj.weight)
    return (module.weight,)


def _with_output(layer: Any) -> list[Any]:
    """Return peft's layer, and of an attention also that of its output."""
    base = layer.get_base_layer()
    return [layer, base.out_proj] if isinstance(base, nn.MultiheadAttention) else [layer]

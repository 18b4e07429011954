"""What an attack is, and the one loop that every gradient attack shares.

Shapes: B batch, C H W image, K classes, D embedding; A the samples of a batch that are still being attacked.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rayclip.attacks import rng
from rayclip.models import ZeroShot
from rayclip.units import format_budget

Norm = Literal["linf", "l2"]
Start = Literal["random", "zero"]
Stop = Literal["first_success", "final"]


# Adversarial class prompts, one a class; None where the text is left alone
Prompts = tuple[str, ...] | None


class Samples(NamedTuple):
    """A batch to attack.

    Attributes:
        images_BCHW: pixels in [0, 1].
        labels_B: true classes.
        keys_B: one 64-bit key a sample (`rng.sample_keys`).
        todo_B: bool; samples that were wrong before the attack are False and stay untouched. None attacks all.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    keys_B: Tensor
    todo_B: Tensor | None = None


class Adversarial(NamedTuple):
    """What an attack made of a batch.

    Attributes:
        images_BCHW: in [0, 1]; the input where the image was not attacked.
        text_KD: class weights to judge against; None where the text was not attacked.
        steps_B: gradient steps behind each image.
        queries_B: image forwards spent on each sample.
        own_texts: adversarial texts of each image's true class, where an attack gives every image texts of its own.
    """

    images_BCHW: Tensor
    text_KD: Tensor | None
    steps_B: Tensor
    queries_B: Tensor
    own_texts: tuple[tuple[str, ...], ...] | None = None

    def logits(self, victim: ZeroShot, labels_B: Tensor) -> Tensor:
        """What the victim makes of it, `(B, K)`."""
        image_BD = victim.embed(self.images_BCHW)
        if self.own_texts is None:
            return victim.logits(image_BD, self.text_KD)
        return victim.logits_with_own(image_BD, mean_embeddings(victim, self.own_texts), labels_B)

    @classmethod
    def untouched(cls, images_BCHW: Tensor, text_KD: Tensor | None = None) -> "Adversarial":
        zeros = torch.zeros(len(images_BCHW), dtype=torch.int64, device=images_BCHW.device)
        return cls(images_BCHW, text_KD, zeros, zeros.clone())


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack with its settings; epsilon comes at call time. Subclasses are frozen dataclasses, one file a family."""

    name: ClassVar[str]
    needs_eps: ClassVar[bool] = True
    for_pairs: ClassVar[bool] = False  # whether it also makes sense where images are the classes (`attacks.pairs`)

    @property
    def label(self) -> str:
        """Short name for tables and metrics, such as `pgd-100`."""
        return self.name

    def describe(self) -> dict[str, Any]:
        """The settings that a result's protocol must state."""
        shown = {"step": format_budget}
        return {f.name: shown.get(f.name, lambda v: v)(getattr(self, f.name)) for f in fields(self)}

    def describe_prepared(self) -> dict[str, Any] | None:
        """The settings that `prepare` depends on; None where there is nothing to prepare."""
        return None

    def prepare(self, victim: ZeroShot) -> Prompts:
        """What depends on model and class set alone: adversarial class prompts. Made once, kept with the results."""
        return None

    @abstractmethod
    def run(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        """Attack a batch.

        Args:
            eps: budget in pixel units; ignored by attacks that leave the image alone.
            prompts: what `prepare` returned.
        """


# (pixels_ACHW, indices_A into the batch) -> (loss_A to raise, broken_A)
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Steps of fixed length along the loss gradient inside a ball; subclasses choose the loss.

    Attributes:
        steps: gradient steps.
        step: length of one, in pixel units.
        norm: `linf`, or `l2` over all pixels and channels of an image.
        start: `random` (linf: uniform in the ball; l2: gaussian direction, uniform radius) or `zero`.
        stop: `first_success` (a sample leaves the batch at its first iterate that fools the model) or `final` (the
            last iterate counts, as in the papers' code).
    """

    steps: int = 10
    step: float = 1 / 255
    norm: Norm = "linf"
    start: Start = "random"
    stop: Stop = "first_success"

    @property
    def label(self) -> str:
        norm = "" if self.norm == "linf" else f"_{self.norm}"
        return f"{self.name}-{self.steps}{norm}"

    def ascend(self, forward: Forward, samples: Samples, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loop. Returns adversarial images, steps and queries.

        Decided samples leave: each step runs on the undecided ones only. The scalar that is differentiated is the sum
        over samples: its sign is the mean's, and a mean underflows in half precision.
        """
        images_BCHW, _, keys_B, todo_B = samples
        adversarial = images_BCHW.clone()
        everyone = torch.arange(len(images_BCHW), device=images_BCHW.device)
        steps_B, queries_B = torch.zeros_like(everyone), torch.zeros_like(everyone)
        active = everyone if todo_B is None else todo_B.nonzero().squeeze(1)
        clean = images_BCHW[active]
        delta = self._into_range(self._initial(clean, keys_B.to(clean.device)[active], eps), clean)
        for done in range(self.steps + 1):
            pixels = (clean + delta).clamp(0, 1)  # adding may round a hair beyond the range
            adversarial[active], steps_B[active] = pixels, done
            if done == self.steps or not len(active):
                break
            with torch.enable_grad():
                loss_A, broken_A = forward(pixels.requires_grad_(), active)
            queries_B[active] += 1
            kept: slice | Tensor = slice(None)
            if self.stop == "first_success":  # looking at who is broken waits for the device; `final` never does
                kept = (~broken_A).nonzero().squeeze(1)
                if not len(kept):
                    break
            (gradient,) = torch.autograd.grad(loss_A[kept].sum(), pixels)
            active, clean = active[kept], clean[kept]
            delta = self._into_range(self._advance(delta[kept], gradient[kept], eps), clean)
        return adversarial, steps_B, queries_B

    def _initial(self, clean: Tensor, keys: Tensor, eps: float) -> Tensor:
        if self.start == "zero":
            return torch.zeros_like(clean)
        shape, dtype = tuple(clean.shape[1:]), clean.dtype
        if self.norm == "linf":
            return (2 * rng.uniform(keys, shape, dtype=dtype) - 1) * eps
        direction = rng.gaussian(keys, shape, dtype=dtype)
        radius = rng.uniform(keys, (1, 1, 1), stream=2, dtype=dtype) * eps
        return direction / _norms(direction) * radius

    def _advance(self, delta: Tensor, gradient: Tensor, eps: float) -> Tensor:
        """One step and the projection onto the ball."""
        if self.norm == "linf":
            return (delta + self.step * gradient.sign()).clamp(-eps, eps)
        delta = delta + self.step * gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
        return delta * (eps / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1)

    @staticmethod
    def _into_range(delta: Tensor, clean: Tensor) -> Tensor:
        """Shrink so that clean + delta stays in [0, 1]; this moves no coordinate away from 0, so the ball holds too."""
        return (clean + delta).clamp(0, 1) - clean


def mean_embeddings(victim: ZeroShot, texts: Sequence[Sequence[str]]) -> Tensor:
    """The mean of the normalised embeddings of each image's texts, `(B, D)`."""
    with torch.no_grad():
        each = victim.clip.embed_texts([text for own in texts for text in own])
        return torch.stack([part.mean(0) for part in each.split([len(own) for own in texts])])


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

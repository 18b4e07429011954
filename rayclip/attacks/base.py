"""What an attack is, and the one loop that every gradient attack shares.

Shapes: B batch, C H W image, K classes, D embedding; A the samples of a batch that are still being attacked.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from rayclip import rng
from rayclip.attacks.variants import Forward, Variant, accumulate, views
from rayclip.models import ZeroShot
from rayclip.settings import settable, written
from rayclip.signatures import no_budget
from rayclip.types import UserError
from rayclip.units import Norm, check_budget, default_step

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
        part_B: of a sequence of attacks, which one broke the sample, counted from 1; 0 where none did.
        own_texts: adversarial texts of each image's true class, where an attack gives every image texts of its own.
    """

    images_BCHW: Tensor
    text_KD: Tensor | None
    steps_B: Tensor
    queries_B: Tensor
    part_B: Tensor | None = None
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


_ROUNDING = 1e-6  # of pixels that somebody has normalised and brought back
_WATCH = 8  # where nobody is judged, so many steps lie between two looks at who has come back to a former perturbation


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack with its settings. Subclasses are frozen dataclasses, one file a family, and say how images are made
    (`craft`).

    Attributes:
        eps: budget in pixel units, of attacks that need one; None leaves it to who runs the attack.
    """

    name: ClassVar[str]
    needs_eps: ClassVar[bool] = True
    black_box: ClassVar[bool] = False  # uses scores only, no gradients
    asks_victim: ClassVar[bool] = True  # whether what it does depends on the victim's answers for images
    for_pairs: ClassVar[bool] = False  # whether it also makes sense where images are the classes (`attacks.pairs`)

    eps: float | None = None

    @property
    def label(self) -> str:
        """Short name for tables and metrics, such as `pgd-100`."""
        return self.name

    @property
    def cost(self) -> int:
        """Forwards and backwards per image at most, roughly."""
        return 0

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The names and types of what a user may set."""
        return {name: kind for name, kind in settable(cls).items() if name != "eps" or cls.needs_eps}

    @property
    def ball(self) -> Norm:
        """The norm that the budget is measured in."""
        return getattr(self, "norm", "linf")

    def within(self, eps: float | None) -> Self:
        """The attack with its budget and what follows from it filled in; its own budget comes first.

        Raises:
            UserError: it needs a budget and there is none, or none that its norm can have.
        """
        if not self.needs_eps:
            return self
        eps = self.eps if self.eps is not None else eps
        if eps is None:
            raise no_budget(self.name)
        check_budget(eps, self.ball, f"attack '{self.name}'")
        return replace(self, eps=eps)

    def for_classes(self, count: int) -> Self:
        """The attack as it runs on data of so many classes.

        Raises:
            UserError: it is not defined for so few.
        """
        return self

    def pinned(self) -> Self:
        """The attack with the fingerprints of the files that its verdicts depend on filled in."""
        return self

    def describe(self) -> dict[str, Any]:
        """The settings that a result's protocol must state."""
        return {name: written(name, getattr(self, name)) for name in self.settings() if name != "eps"}

    def describe_prepared(self) -> dict[str, Any] | None:
        """The settings that `prepare` depends on; None where there is nothing to prepare."""
        return None

    def prepare(self, victim: ZeroShot) -> Prompts:
        """What depends on model and class set alone: adversarial class prompts. Made once, kept with the results."""
        return None

    def run(
        self, victim: ZeroShot, samples: Samples, *, eps: float | None = None, prompts: Prompts = None
    ) -> Adversarial:
        """Attack a batch.

        Args:
            eps: budget in pixel units, in place of the attack's own; ignored by attacks that leave the image alone.
            prompts: what `prepare` returned.

        Raises:
            UserError: no budget; one that is negative, not finite, or in l_inf 1 or more; pixels outside [0, 1].
        """
        ready = self if eps is None or not self.needs_eps else replace(self, eps=eps)
        ready = ready.within(None)
        check_pixels(samples.images_BCHW)
        return ready.craft(victim, samples, eps=ready.eps or 0.0, prompts=prompts)

    @abstractmethod
    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        """What `run` does once budget and pixels are checked."""


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Steps of fixed length along the loss gradient inside a ball; subclasses choose the loss.

    Attributes:
        steps: gradient steps.
        step: length of one, in pixel units; None is `default_step` of the budget.
        norm: `linf`, or `l2` over all pixels and channels of an image.
        start: `random` (linf: uniform in the ball; l2: gaussian direction, uniform radius) or `zero`.
        stop: `first_success` (a sample leaves the batch at its first iterate that fools the model) or `final` (the
            last iterate counts, as in the papers' code).
        variant: how the gradient is made to transfer: `plain`, or any of `mi`, `di`, `si` joined by `-`
            (`attacks.variants`). The verdict is always on the image itself.
    """

    steps: int = 10
    step: float | None = None
    norm: Norm = "linf"
    start: Start = "random"
    stop: Stop = "first_success"
    variant: Variant = "plain"

    def within(self, eps: float | None) -> Self:
        found = super().within(eps)
        if found.step is not None or found.eps is None:
            return found
        return replace(found, step=default_step(found.eps, self.steps, self.ball))

    @property
    def label(self) -> str:
        return f"{self.name}-{self.suffix}" + ("" if self.norm == "linf" else f"_{self.norm}")

    @property
    def suffix(self) -> str:
        """Variant and steps, as a label shows them: `100`, `mi-di-100`."""
        return str(self.steps) if self.variant == "plain" else f"{self.variant}-{self.steps}"

    @property
    def cost(self) -> int:
        return 2 * self.steps

    def follow(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """What a step follows: the gradient, or what that adds to the `direction` of the step before (zeros at first);
        the hook of attacks that remember."""
        return accumulate(self.variant, direction, gradient)

    def ascend(
        self, forward: Forward, samples: Samples, *, eps: float, constant: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loop. Returns adversarial images, steps and queries.

        Decided samples leave: each step runs on the undecided ones only. The scalar that is differentiated is the sum
        over samples: its sign is the mean's, and a mean underflows in half precision.

        Args:
            constant: whether `forward` is a function of the pixels alone, without noise of its own. Then a
                perturbation that was met before has a known future, and its sample is decided too: signed steps in a
                small ball soon go to and fro between two images.
        """
        images_BCHW, _, keys_B, todo_B = samples
        adversarial = images_BCHW.clone()
        everyone = torch.arange(len(images_BCHW), device=images_BCHW.device)
        steps_B, queries_B = torch.zeros_like(everyone), torch.zeros_like(everyone)
        active = everyone if todo_B is None else todo_B.nonzero().squeeze(1)
        clean, keys = images_BCHW[active], keys_B.to(images_BCHW.device)[active]
        delta = torch.zeros_like(clean) if self.start == "zero" else random_start(clean, keys, eps, self.norm)
        direction = torch.zeros_like(clean)
        before = earlier = torch.full_like(clean, torch.nan)  # the perturbations of one and of two steps ago
        length = default_step(eps, self.steps, self.norm) if self.step is None else self.step
        judge, repeats = self.stop == "first_success", constant and self.variant in ("plain", "si")
        for done in range(self.steps + 1):
            pixels = (clean + delta).clamp(0, 1)  # adding may round a hair beyond the range
            adversarial[active], steps_B[active] = pixels, done
            if done == self.steps or not len(active):
                break
            look = views(self.variant, forward, keys, done, judge=judge)
            with torch.enable_grad():
                loss_A, broken_A, forwards = look(pixels.requires_grad_(), active)
            queries_B[active] += forwards
            decided_A = broken_A if judge else torch.zeros_like(broken_A)
            watch = repeats and (judge or (done > 0 and done % _WATCH == 0))
            if watch:
                turns_A = (delta == earlier).flatten(1).all(1) & ~decided_A
                last = delta if (self.steps - done) % 2 == 0 else before
                adversarial[active] = torch.where(wide(turns_A), (clean + last).clamp(0, 1), pixels.detach())
                steps_B[active] = torch.where(turns_A, self.steps, done)
                decided_A = decided_A | turns_A
            kept: slice | Tensor = slice(None)
            if judge or watch:  # looking at who is decided waits for the device
                kept = (~decided_A).nonzero().squeeze(1)
                if not len(kept):
                    break
            (gradient,) = torch.autograd.grad(loss_A[kept].sum(), pixels)
            active, clean, keys = active[kept], clean[kept], keys[kept]
            direction = self.follow(direction[kept], gradient[kept])
            earlier, before = before[kept], delta[kept]
            delta = project(before + length * steepest(direction, self.norm), clean, eps, self.norm)
        return adversarial, steps_B, queries_B


def check_pixels(images_BCHW: Tensor) -> None:
    """Raise a `UserError` unless all pixels are in [0, 1], up to rounding. One wait for the device."""
    if not images_BCHW.numel():
        return
    low, high = torch.stack(images_BCHW.detach().aminmax()).tolist()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
        raise UserError(
            f"images have pixels from {low:.3g} to {high:.3g}, and attacks take pixels in [0, 1]: divide bytes by 255, "
            "and leave normalisation to the model."
        )


def random_start(clean: Tensor, keys: Tensor, eps: float, norm: Norm, *, stream: int = 0) -> Tensor:
    """A perturbation of each image, a function of its key and `stream` (l2 uses three): linf uniform in the ball, l2 of
    gaussian direction and uniform radius; then cut to the image range."""
    shape, dtype = tuple(clean.shape[1:]), clean.dtype
    if norm == "linf":
        delta = (2 * rng.uniform(keys, shape, stream=stream, dtype=dtype) - 1) * eps
    else:
        direction = rng.gaussian(keys, shape, stream=stream, dtype=dtype)
        radius = rng.uniform(keys, (1, 1, 1), stream=stream + 2, dtype=dtype) * eps
        delta = direction / _norms(direction) * radius
    return _into_range(delta, clean)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of unit length in which a linear loss rises most."""
    return (
        gradient.sign() if norm == "linf" else gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    )


def project(delta: Tensor, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Into the eps ball, then cut so that clean + delta lies in [0, 1]."""
    if norm == "linf":
        return _into_range(delta.clamp(-eps, eps), clean)
    return _into_range(delta * (eps / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1), clean)


def _into_range(delta: Tensor, clean: Tensor) -> Tensor:
    """Shrink so that clean + delta stays in [0, 1]; this moves no coordinate away from 0, so the ball holds too."""
    return (clean + delta).clamp(0, 1) - clean


def margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """z_y minus the largest other logit, `(B,)`: positive where the prediction is right."""
    own = logits_BK.gather(1, labels_B[:, None]).squeeze(1)
    others = logits_BK.scatter(1, labels_B[:, None], -torch.inf)
    return own - others.amax(1)


def wide(x_A: Tensor) -> Tensor:
    """A number an image, in the shape that scales images: `(A, 1, 1, 1)`."""
    return x_A.view(-1, 1, 1, 1)


def sizes(deltas: Tensor, norm: Norm) -> Tensor:
    """How long perturbations `(A, ...)` are, `(A,)`."""
    return deltas.flatten(1).norm(dim=1) if norm == "l2" else deltas.flatten(1).abs().amax(1)


def mean_embeddings(victim: ZeroShot, texts: Sequence[Sequence[str]]) -> Tensor:
    """Text weights `(B, D)` of each image's own texts, from the mean of their normalised embeddings."""
    with torch.no_grad():
        each = victim.clip.embed_texts([text for own in texts for text in own])
        return victim.weights(torch.stack([part.mean(0) for part in each.split([len(own) for own in texts])]))


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

"""The attack interface, its input and output types, and the loop that all gradient attacks share.

Shapes: B batch, C H W image, K classes, D embedding; A the samples of a batch that are still being attacked.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from rayclip.attacks.geometry import advance, check_pixels, per_image, random_start
from rayclip.attacks.variants import Forward, Variant, accumulate, views
from rayclip.models import Clip, ZeroShot
from rayclip.names import no_budget
from rayclip.settings import Configurable, format_value
from rayclip.units import Norm, check_budget, default_step, in_255ths

Start = Literal["random", "zero"]
Stop = Literal["first_success", "final"]


# Adversarial class prompts, one per class; None if the attack leaves the text unchanged
Prompts = tuple[str, ...] | None


class Samples(NamedTuple):
    """A batch to attack.

    Attributes:
        images_BCHW: pixels in [0, 1].
        labels_B: true classes.
        keys_B: one 64-bit key per sample (`rng.sample_keys`).
        todo_B: bool; False marks samples that were wrong before the attack and stay unchanged. None attacks all.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    keys_B: Tensor
    todo_B: Tensor | None = None


class Adversarial(NamedTuple):
    """The result of attacking a batch.

    Attributes:
        images_BCHW: pixels in [0, 1]; the input itself where an image was not attacked.
        text_KD: adversarial class weights to classify against; None if the text was not attacked.
        steps_B: gradient steps taken for each image.
        queries_B: image forward passes spent on each sample.
        part_B: for a sequence of attacks, the number (from 1) of the one that broke the sample; 0 if none did.
        own_texts: adversarial texts of each image's true class, for attacks that give every image its own texts.
    """

    images_BCHW: Tensor
    text_KD: Tensor | None
    steps_B: Tensor
    queries_B: Tensor
    part_B: Tensor | None = None
    own_texts: tuple[tuple[str, ...], ...] | None = None

    def logits(self, victim: ZeroShot, labels_B: Tensor, image_BD: Tensor | None = None) -> Tensor:
        """Return the victim's logits for the adversarial examples, `(B, K)`; `image_BD` are the images' embeddings, if
        they are known."""
        if image_BD is None:
            image_BD = victim.embed(self.images_BCHW)
        if self.own_texts is None:
            return victim.logits(image_BD, self.text_KD)
        return victim.logits_with_own(image_BD, mean_embeddings(victim, self.own_texts), labels_B)

    def rows(self, at_A: Tensor) -> "Adversarial":
        """Return some of the examples, by their positions."""
        own = None if self.own_texts is None else tuple(self.own_texts[i] for i in at_A.tolist())
        part_A = None if self.part_B is None else self.part_B[at_A]
        return Adversarial(self.images_BCHW[at_A], self.text_KD, self.steps_B[at_A], self.queries_B[at_A], part_A, own)

    @classmethod
    def untouched(cls, images_BCHW: Tensor, text_KD: Tensor | None = None) -> "Adversarial":
        zeros = torch.zeros(len(images_BCHW), dtype=torch.int64, device=images_BCHW.device)
        return cls(images_BCHW, text_KD, zeros, zeros.clone())


_WATCH = 8  # under `final`: steps between two checks for perturbations that repeat


@dataclass(frozen=True, kw_only=True)
class Attack(Configurable, ABC):
    """An attack with its settings. Subclasses are frozen dataclasses, one file per family, and define how adversarial
    images are made (`craft`).

    Attributes:
        eps: budget in pixel units, for attacks that need one; None leaves it to the caller.
    """

    noun: ClassVar[str] = "attack"
    needs_eps: ClassVar[bool] = True
    black_box: ClassVar[bool] = False  # uses scores only, no gradients
    asks_victim: ClassVar[bool] = True  # whether its result depends on the victim's outputs for images
    for_pairs: ClassVar[bool] = False  # whether it can attack image-caption pairs, too (`attacks.pairs`)
    for_training: ClassVar[bool] = False  # whether methods can train against its objective (`training_objective`)
    gives_own_texts: ClassVar[bool] = False  # whether each image gets texts of its own (`Adversarial.own_texts`)

    eps: float | None = None

    @property
    def label(self) -> str:
        """Short name for tables and metrics, such as `pgd-100`."""
        return self.name

    @property
    def label_with_budget(self) -> str:
        """Name in metrics, with the budget in units of 1/255 if it has one: `pgd-100_eps1`, `bert`."""
        return self.label if self.eps is None or not self.needs_eps else f"{self.label}_eps{in_255ths(self.eps)}"

    @property
    def cost(self) -> int:
        """Approximate upper bound on the forward and backward passes per image."""
        return 0

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the names and types of the settings that a user may choose."""
        return {name: kind for name, kind in super().settings().items() if name != "eps" or cls.needs_eps}

    @property
    def ball(self) -> Norm:
        """Norm in which the budget is measured."""
        return getattr(self, "norm", "linf")

    def within(self, eps: float | None) -> Self:
        """Return the attack with its budget and the settings derived from it filled in; its own budget takes
        precedence.

        Raises:
            UserError: the attack needs a budget and has none, or the budget is invalid in its norm.
        """
        if not self.needs_eps:
            return self
        eps = self.eps if self.eps is not None else eps
        if eps is None:
            raise no_budget(self.name)
        check_budget(eps, self.ball, f"attack '{self.name}'")
        return replace(self, eps=eps)

    def within_on_pairs(self, eps: float | None) -> Self:
        """Return `within` for image-caption pairs, where defaults may differ."""
        return self.within(eps)

    @property
    def stops_early(self) -> bool:
        """Return whether a sample may leave the attack once it fools the classifier that the attack sees."""
        return True

    def to_last_step(self) -> Self:
        """Return the attack as it runs where another classifier judges than the one that it sees: it must not stop at
        its first success, which says little there."""
        return self

    def training_objective(
        self, clip: Clip, images_BCHW: Tensor, labels_B: Tensor, texts: Callable[[], Tensor], texts_per_class: int
    ) -> Callable[[Tensor], Tensor]:
        """Return what the attack maximises, `pixels (B, C, H, W) -> (B,)`, for methods that train against it.

        Args:
            clip: the model in training.
            texts: returns the texts' embeddings, all classes' first texts, then all second ones, …
        """
        raise NotImplementedError

    def for_classes(self, count: int) -> Self:
        """Return the attack as it runs on data with `count` classes.

        Raises:
            UserError: the attack is not defined for so few classes.
        """
        return self

    def pinned(self) -> Self:
        """Return the attack with the fingerprints of the files that its verdicts depend on filled in."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return the settings that a result's protocol must state."""
        return {name: format_value(name, getattr(self, name)) for name in self.settings() if name != "eps"}

    def describe_prepared(self) -> dict[str, Any] | None:
        """Return the settings that `prepare` depends on; None if there is nothing to prepare."""
        return None

    def prepare(self, victim: ZeroShot) -> Prompts:
        """Return adversarial class prompts, which depend on model and class set alone; made once and kept with the
        results."""
        return None

    def describe_text(self) -> dict[str, Any] | None:
        """Return the settings that adversarial texts depend on; None if the attack changes no texts."""
        return None

    @property
    def changes_texts(self) -> bool:
        return self.describe_text() is not None

    def more_texts(self, class_names: Sequence[str]) -> Sequence[Sequence[str]]:
        """Return texts of each class that the attack embeds besides the scorer's prompts."""
        return ()

    def with_default_substitutes(self, substitutes: str) -> Self:
        """Return the attack with `substitutes` as the source of replacement words, if it needs one and names none."""
        return self

    def check(self, clip: Clip) -> None:
        """Raise a `UserError` if the attack cannot run on this model, before any work starts."""

    def count_cut(self, clip: Clip, texts: Sequence[str]) -> int:
        """Return how many of the texts are longer than what the attack reads to change them."""
        return 0

    def run(
        self, victim: ZeroShot, samples: Samples, *, eps: float | None = None, prompts: Prompts = None
    ) -> Adversarial:
        """Attack a batch.

        Args:
            eps: budget in pixel units, replacing the attack's own; ignored by attacks that leave the image unchanged.
            prompts: the result of `prepare`.

        Raises:
            UserError: the budget is missing, negative, not finite, or in l_inf 1 or more; or pixels lie outside [0, 1].
        """
        ready = self if eps is None or not self.needs_eps else replace(self, eps=eps)
        ready = ready.within(None)
        check_pixels(samples.images_BCHW)
        return ready.craft(victim, samples, eps=ready.eps or 0.0, prompts=prompts)

    @abstractmethod
    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        """Make the adversarial examples; `run` calls this after checking budget and pixels."""


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Attack that takes steps of fixed length along the loss gradient inside a ball; subclasses choose the loss.

    Attributes:
        steps: number of gradient steps.
        step: length of a step, in pixel units; None uses `default_step` of the budget.
        norm: `linf`, or `l2` over all pixels and channels of an image.
        start: `random` (linf: uniform in the ball; l2: gaussian direction, uniform radius) or `zero`.
        stop: `first_success` (a sample leaves the batch at its first iterate that fools the model) or `final` (the last
            iterate counts, as in the papers' code).
        variant: modification of the gradient for better transfer: `plain` (none), or any of `mi`, `di`, `si` joined by
            `-` (`attacks.variants`). The verdict is always on the image itself.
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
        """Variant and number of steps as labels show them: `100`, `mi-di-100`."""
        return str(self.steps) if self.variant == "plain" else f"{self.variant}-{self.steps}"

    @property
    def cost(self) -> int:
        return 2 * self.steps

    def within_on_pairs(self, eps: float | None) -> Self:
        """Return `within`; unless a step length is set, it is the papers' for retrieval, 1.25·eps/steps
        (Co-Attack's)."""
        placed = self.within(eps)
        if placed.eps is None or self.step is not None:
            return placed
        return replace(self, eps=placed.eps, step=1.25 * placed.eps / self.steps)

    @property
    def stops_early(self) -> bool:
        return self.stop == "first_success"

    def to_last_step(self) -> Self:
        return replace(self, stop="final")

    def follow(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """Return the direction of the next step: the gradient, or its combination with the `direction` of the previous
        step (zeros at first). Hook for attacks with momentum."""
        return accumulate(self.variant, direction, gradient)

    def ascend(
        self, forward: Forward, samples: Samples, *, eps: float, constant: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the attack loop; return adversarial images, steps and queries.

        Each step runs on the undecided samples only; decided ones leave the batch. The scalar that is differentiated is
        the sum over samples: its sign is the mean's, and a mean underflows in half precision.

        Args:
            constant: whether `forward` is a function of the pixels alone, without noise of its own. Then, once a
                perturbation repeats, all later steps are known, and its sample is decided too: signed steps in a small
                ball soon alternate between two images.
        """
        images_BCHW, _, keys_B, todo_B = samples
        adversarial = images_BCHW.clone()
        everyone = torch.arange(len(images_BCHW), device=images_BCHW.device)
        steps_B, queries_B = torch.zeros_like(everyone), torch.zeros_like(everyone)
        active = everyone if todo_B is None else todo_B.nonzero().squeeze(1)
        clean, keys = images_BCHW[active], keys_B.to(images_BCHW.device, non_blocking=True)[active]
        delta = torch.zeros_like(clean) if self.start == "zero" else random_start(clean, keys, eps, self.norm)
        direction = torch.zeros_like(clean)
        before = earlier = torch.full_like(clean, torch.nan)  # the perturbations of one and of two steps ago
        length = default_step(eps, self.steps, self.norm) if self.step is None else self.step
        judge, repeats = self.stop == "first_success", constant and self.variant in ("plain", "si")
        pixels = (clean + delta).clamp(0, 1)  # the sum may round slightly beyond the range
        for done in range(self.steps):
            if not len(active):
                break
            look = views(self.variant, forward, keys, done, judge=judge)
            with torch.enable_grad():
                loss_A, broken_A, forwards = look(pixels.requires_grad_(), active)
            queries_B[active] += forwards
            watch = repeats and (judge or (done > 0 and done % _WATCH == 0))
            kept: slice | Tensor = slice(None)
            if judge or watch:
                decided_A = broken_A if judge else torch.zeros_like(broken_A)
                turns_A = torch.zeros_like(broken_A)
                if watch:
                    turns_A = (delta == earlier).flatten(1).all(1) & ~decided_A
                # Waits for the device: on an H100 at most 0.3 % of a step. Looking every few steps costs more there, as
                # what decided samples keep is written in each step between
                left = (~(decided_A | turns_A)).nonzero().squeeze(1)
                if len(left) < len(active):
                    last = delta if (self.steps - done) % 2 == 0 else before
                    repeated = (clean + last).clamp(0, 1)
                    adversarial[active] = torch.where(per_image(turns_A), repeated, pixels.detach())
                    steps_B[active] = torch.where(turns_A, self.steps, done)
                    kept = left
                if not len(left):
                    break
            (gradient,) = torch.autograd.grad(loss_A[kept].sum(), pixels)
            active, clean, keys = active[kept], clean[kept], keys[kept]
            direction = self.follow(direction[kept], gradient[kept])
            earlier, before = before[kept], delta[kept]
            delta, pixels = advance(before, direction, clean, length, eps, self.norm)
        else:
            adversarial[active] = pixels.detach()
            steps_B.index_fill_(0, active, self.steps)
        return adversarial, steps_B, queries_B


@dataclass(frozen=True, kw_only=True)
class TextOnlyAttack(Attack):
    """Base of the attacks on texts alone: clean images against the adversarial class prompts (captions) that `prepare`
    makes, for which all settings count unless `describe_text` says otherwise."""

    needs_eps: ClassVar[bool] = False
    asks_victim: ClassVar[bool] = False
    for_pairs: ClassVar[bool] = True

    def describe_text(self) -> dict[str, Any]:
        return {"attack": self.name, **self.describe()}

    def describe_prepared(self) -> dict[str, Any] | None:
        return self.describe_text()

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        assert prompts is not None, "call prepare first"
        return Adversarial.untouched(samples.images_BCHW, victim.embed_prompts(prompts))


def mean_embeddings(victim: ZeroShot, texts: Sequence[Sequence[str]]) -> Tensor:
    """Return text weights `(B, D)` for each image, computed from the mean of the normalised embeddings of its own
    texts."""
    with torch.no_grad():
        each = victim.clip.embed_texts([text for own in texts for text in own])
        return victim.weights(torch.stack([part.mean(0) for part in each.split([len(own) for own in texts])]))

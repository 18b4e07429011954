"""The interface of training methods, and the inputs they get.

The train loop calls `attack` (gradients of the weights off) and then `loss`, both in eval mode: BatchNorm keeps its
statistics and dropout is off (`training.step.attack_and_backward`). A method sees pixels in [0, 1], labels, and the
class prompts; it never sees an optimiser, a device or a cluster.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from rayclip.attacks.base import Attack, GradientAttack, Norm, Samples, Start
from rayclip.attacks.pgd import PGD
from rayclip.attacks.registry import ATTACKS
from rayclip.models import Clip, class_prompts
from rayclip.models.fast import is_fast_copy
from rayclip.models.lora import LoraSettings, check_lora
from rayclip.models.prompts import Prompted
from rayclip.settings import Configurable
from rayclip.types import UserError
from rayclip.units import default_step

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "linear", "constant"]
OWN = "own"  # the method's own objective
Trains = str  # a part of the model, as `Clip.parameters_of` takes it


class Present(NamedTuple):
    """The classes of a batch.

    Attributes:
        labels: in ascending order.
        labels_C: the same as a tensor.
        places_B: each sample's place among them.
    """

    labels: list[int]
    labels_C: Tensor
    places_B: Tensor

    @classmethod
    def among(cls, labels_B: Tensor) -> Self:
        """Find the classes of a batch. Waits for the device once."""
        found, places = np.unique(labels_B.cpu().numpy(), return_inverse=True)
        there = (torch.from_numpy(x).to(labels_B.device, non_blocking=True) for x in (found, places))
        return cls(found.tolist(), *there)


class ClassTexts:
    """The class prompts' embeddings during training: computed once if the text encoder is frozen, else with
    gradients."""

    def __init__(self, clip: Clip, prompts: Sequence[str], *, trainable: bool) -> None:
        self._clip, self.prompts = clip, list(prompts)
        self._frozen_KD: dict[str, Tensor] = {}
        self._tokens_KL = clip.tokenize(self.prompts)
        with torch.no_grad():
            self._fixed_KD = None if trainable else clip.embed_texts(self.prompts)

    def all(self) -> Tensor:
        """Return `(K, D)`, one row per class."""
        return self._clip.encode_text(self._tokens_KL) if self._fixed_KD is None else self._fixed_KD

    @torch.no_grad()
    def without_learned(self, template: str) -> Tensor:
        """Return the embeddings of the prompts in `template` by the frozen model alone, without a learned context,
        `(K, D)`; computed once."""
        if template not in self._frozen_KD:
            tokens_KL = self._clip.tokenize([template.format(prompt) for prompt in self.prompts])
            self._frozen_KD[template] = Clip.encode_text(self._clip, tokens_KL)
        return self._frozen_KD[template]

    def of(self, present: Present) -> Tensor:
        """Return `(B, D)`, the embedding of each sample's own class; each class present is encoded once."""
        if self._fixed_KD is not None:
            return self._fixed_KD[present.labels_C[present.places_B]]
        return self._clip.encode_text(self._tokens_KL[present.labels_C])[present.places_B]


@dataclass(frozen=True, kw_only=True)
class Original:
    """The frozen model that training started from: f₀ in the papers.

    Attributes:
        clip: in eval mode, without gradients.
        texts: this model's embeddings of the class prompts, the same prompts as in `Batch.texts`.
        copied: its copy for attacks, if the training attack runs on a copy of the model, too.
    """

    clip: Clip
    texts: ClassTexts
    copied: Clip | None = None

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: Tensor, *, normalize: bool = True) -> Tensor:
        return (self.copied or self.clip).encode_image(pixels_BCHW, normalize=normalize)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's part of a global batch.

    Attributes:
        pixels_BCHW: clean, in [0, 1].
        labels_B: int64.
        keys_B: one 64-bit key per sample and step, for the attack's random start.
        texts: the class prompts' embeddings.
        total: samples in the global batch.
        original: for methods that need it (`Method.needs_original`).
        prepared_BD: the result of `Method.prepare` for the samples, computed before training.
        adversarial_BCHW: adversarial images that `Method.attack` made.
        present: the classes of the samples, if the attack looked at them.
        adversarial_prompts: adversarial prompts that it made for the classes present, by label.
        adversarial_texts: adversarial texts that it made for the samples, one each.
        original_BD: the original model's un-normalised embeddings of the clean images, or of the samples' clean texts,
            if the attack computed them.
        auxiliary: the network that is trained beside the model, for methods that have one (`Method.auxiliary`).
    """

    pixels_BCHW: Tensor
    labels_B: Tensor
    keys_B: Tensor
    texts: ClassTexts
    total: int
    original: Original | None = None
    prepared_BD: Tensor | None = None
    adversarial_BCHW: Tensor | None = None
    present: Present | None = None
    adversarial_prompts: dict[int, str] | None = None
    adversarial_texts: list[str] | None = None
    original_BD: Tensor | None = None
    auxiliary: nn.Module | None = None

    def split(self, parts: int) -> list["Batch"]:
        """Split a batch that has not been attacked yet into `parts` of nearly equal size, fewer if it has fewer
        samples.

        The parts keep `total`, so that their losses add up to the loss of the whole batch.
        """
        size = max(1, -(-len(self.labels_B) // parts))
        names = ["pixels_BCHW", "labels_B", "keys_B"] + ["prepared_BD"] * (self.prepared_BD is not None)
        rows = zip(*(getattr(self, name).split(size) for name in names), strict=True)
        return [replace(self, **dict(zip(names, values, strict=True))) for values in rows]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A paper's training recipe for its method; every entry can be overridden for a run.

    Attributes:
        schedule: of the learning rate after its warm-up.
        warmup_steps, warmup_epochs: length of the warm-up, their sum; a tenth of the run at most unless `warmup_whole`,
            since the papers' 1000 steps are meant for runs of tens of thousands.
        warmup_lr: constant rate during the warm-up; with None it rises linearly to `lr`.
        warmup_whole: keep the warm-up's full length even if the run ends within it, as in the papers' code.
        batch_size: images per step, over all workers.
    """

    optimizer: Optimizer
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    momentum: float = 0.9
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    warmup_epochs: int = 0
    warmup_lr: float | None = None
    warmup_whole: bool = False
    batch_size: int = 256
    epochs: int = 10


SMALL_BELOW = 20_000_000  # parameters
# For models of a few million parameters, which the papers' learning rates would hardly change. Chosen on a fifth of the
# digits' train split; the test split was not used.
SMALL_MODEL = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.01, warmup_steps=10, batch_size=128, epochs=8)


@dataclass(frozen=True, kw_only=True)
class Method(Configurable, ABC):
    """A training method with its settings; subclasses are frozen dataclasses, one file each.

    Attributes:
        against: objective that the image attack maximises: `own` is the method's own; `pgd`, `cw`, `feature` are those
            of the attacks with these names (`Attack.training_objective`).
        eps, steps, step: budget, number and length of the image attack's steps, in pixel units; a step of None is
            `units.default_step`.
        norm, start: of the image attack, see `attacks.base.GradientAttack`.
        trains: `all` parameters, the `image` or the `text` encoder's, or those of the image encoder's `last-N` blocks
            (`Clip.parameters_of`); or `lora:rank=8,part=image`, low-rank changes of a part's layers (`models.lora`).
    """

    noun: ClassVar[str] = "method"
    recipe: ClassVar[Recipe]
    published: ClassVar[Mapping[str, Any]] = {}  # settings of the published code that are not the defaults here
    needs_original: ClassVar[bool] = False  # whether the method uses `Batch.original`
    small: ClassVar[Recipe] = SMALL_MODEL  # for small models
    prepares: ClassVar[bool] = False  # whether `prepare` must be called
    learns_prompt: ClassVar[bool] = False  # whether it learns a part around a frozen model instead of weights

    against: str = OWN
    eps: float = 1 / 255
    steps: int = 10
    step: float | None = None
    norm: Norm = "linf"
    start: Start = "random"
    trains: Trains = "all"

    @classmethod
    def uses_attack(cls) -> bool:
        """Return whether it trains on attacked images: if not, the attack's settings change nothing, and a sweep leaves
        them out."""
        return cls.prepares or cls.attack is not Method.attack

    def recipe_for(self, patch: int | None) -> Recipe:
        """Return the published recipe for an image tower with patches of `patch` pixels (None: it has no patches)."""
        return self.recipe

    @property
    def step_length(self) -> float:
        """Length of the image attack's steps, in pixel units."""
        return default_step(self.eps, self.steps, self.norm) if self.step is None else self.step

    @property
    def compares_samples(self) -> bool:
        """True if a sample's loss or attack depends on the rest of its batch."""
        return False

    def with_default_substitutes(self, substitutes: str) -> Self:
        """Return the method with `substitutes` as the source for its text attack, if it has a text attack and names no
        source."""
        return self

    def count_cut(self, clip: Clip, texts: Sequence[str]) -> int:
        """Return how many of the texts are longer than what a text attack reads to change them."""
        return 0

    def prompts(self, class_names: Sequence[str], template: str) -> list[str]:
        """Return the texts behind `Batch.texts`: one per class, or all classes' first texts, then all second ones,
        ..."""
        return class_prompts(class_names, template)

    def describe(self) -> dict[str, Any]:
        """Return the settings as nested plain values; lineage files hold them, and they distinguish runs."""
        return asdict(self) | {"step": self.step_length}

    def check(self, clip: Clip) -> None:
        """Raise a `UserError` if the method cannot train this model."""
        self.parameters(clip)
        if self.lora is not None:
            check_lora(clip, self.lora)
        self.check_attack()

    def parameters(self, clip: Clip) -> list[nn.Parameter]:
        """Return the parameters that the method trains, all of which its loss has to depend on."""
        return clip.parameters_of(self.part)

    def check_attack(self) -> None:
        """Raise a `UserError` if the method cannot train against this attack."""
        if self.against == OWN:
            return
        possible = [name for name, kind in ATTACKS.items() if kind.for_training]
        if self.against not in possible:
            raise UserError(
                f"--attack '{self.against}' is no training attack: use {OWN} or one of {', '.join(possible)}."
            )
        self._other_attack()

    def _other_attack(self) -> Attack:
        """Return the attack whose objective the training attack maximises."""
        shared = {"start": self.start, "norm": self.norm}
        kind = ATTACKS.find(self.against)
        return kind.with_settings({key: value for key, value in shared.items() if key in kind.settings()})

    @property
    def texts_per_class(self) -> int:
        """Number of `prompts` per class."""
        return 1

    def class_texts(self, batch: Batch) -> Tensor:
        """Return those of the prompts' embeddings that classes are told apart by: all, unless it has prompts of another
        kind."""
        return batch.texts.all()

    def auxiliary(self, clip: Clip, seed: int) -> nn.Module:
        """Return a network that the optimiser trains beside the model (`Batch.auxiliary`): part of training states, not
        of checkpoints' models. By default one without parameters."""
        return nn.Identity()

    @property
    def trains_texts(self) -> bool:
        """True if the class prompts' embeddings change during training."""
        return self.part in ("all", "text")

    @property
    def lora(self) -> LoraSettings | None:
        """Settings of LoRA, if `trains` asks for it; its part is the method's own unless named."""
        own = next(f.default for f in fields(type(self)) if f.name == "trains")
        return LoraSettings.parse(self.trains, str(own))

    @property
    def part(self) -> str:
        """The part of the model that is trained, whether in full or by LoRA (`Clip.parameters_of`)."""
        return self.trains if self.lora is None else self.lora.part

    def wrap_model(self, clip: Clip, seed: int) -> Clip:
        """Return the model as it is trained: itself, or with the part to be learned added around it."""
        return clip

    def prepare(self, clip: Clip, batch: Batch) -> Tensor:
        """Return what is computed once per sample before training, `(B, D)`. Called with `clip` frozen."""
        raise NotImplementedError

    def weakened(self, share: float) -> Self:
        """Return the method with this share (0..1) of its budget; the steps shrink in proportion, so that the attack
        crosses the smaller ball in as many steps."""
        return replace(self, eps=share * self.eps, step=share * self.step_length)

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        """Add the adversarial examples that `loss` needs. Called with `clip` frozen."""
        return batch

    @abstractmethod
    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise and detached scalars to log, all of them sums over samples
        (`parallel.global_mean`)."""

    def image_attack(self) -> GradientAttack:
        """Return PGD with the method's settings; it runs to its last step."""
        return PGD(steps=self.steps, step=self.step_length, norm=self.norm, start=self.start, stop="final")

    def perturb(self, clip: Clip, batch: Batch, own: Callable[[Tensor], Tensor]) -> Batch:
        """Attack every image with `image_attack`, maximising the objective that `against` names.

        Args:
            own: the method's own objective, `pixels_BCHW -> (B,)`.
        """
        objective = own
        if self.against != OWN:
            texts = functools.partial(self.class_texts, batch)
            given = clip, batch.pixels_BCHW, batch.labels_B, texts, self.texts_per_class
            objective = self._other_attack().training_objective(*given)

        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return objective(pixels), torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)

        pgd = self.image_attack()
        samples = Samples(batch.pixels_BCHW, batch.labels_B, batch.keys_B)
        autocast = torch.is_autocast_enabled(clip.device.type) and not is_fast_copy(clip)
        with torch.autocast(clip.device.type, enabled=autocast):
            images, _, _ = pgd.ascend(forward, samples, eps=self.eps)
        return replace(batch, adversarial_BCHW=images)


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """A method that learns a prompt around a frozen model (`models.prompts`)."""

    learns_prompt: ClassVar[bool] = True

    trains: Trains = "prompt"

    def check(self, clip: Clip) -> None:
        if self.trains != "prompt":
            raise UserError(f"{self.name} learns a prompt around a frozen model: leave --trains away.")
        if isinstance(clip, Prompted):
            raise UserError(f"model '{clip.spec}' has a learned prompt already: name the model that it stands on.")
        self.check_attack()

    @abstractmethod
    def wrap_model(self, clip: Clip, seed: int) -> Clip: ...

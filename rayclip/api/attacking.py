"""Models and classifiers in memory, and attacks on them: for notebooks, and for models that rayclip does not know.

Shapes: B images, C H W image, K classes, D embedding.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rayclip.api.pictures import Labelled, PictureReader, check_labels
from rayclip.attacks import Attack, Samples, parse_attacks
from rayclip.data import Resolution
from rayclip.data.captions import bind_captions
from rayclip.defenses import (
    DRAWS,
    IGNORE,
    Aim,
    Chain,
    Defended,
    chain_label,
    is_random,
    parse_aims,
    parse_defenses,
    pinned,
)
from rayclip.evaluation.cell import default_substitutes
from rayclip.evaluation.saving import SavedSet, save_adversarial
from rayclip.models import TEMPLATE, Clip, ZeroShot
from rayclip.models.clip import frozen
from rayclip.models.exact import exact_fp32
from rayclip.models.function import FunctionClassifier
from rayclip.models.scorers import DEFAULT, Scorer, parse_scorers
from rayclip.models.zeroshot import find_faults
from rayclip.names import attack_defaults, check_template
from rayclip.rng import sample_keys
from rayclip.types import UserError
from rayclip.units import Norm, parse_budget

T = TypeVar("T")


class Model:
    """A CLIP in memory: `rayclip.load` and `rayclip.wrap` make it.

    Attributes:
        clip: the module; `clip.encode_image` takes pixels in [0, 1], `clip.embed_texts` sentences.
        spec: what it was loaded from, or `wrapped:NAME`.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip, self.spec = clip, clip.spec

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def to(self, device: torch.device | str) -> "Model":
        """Move the model to another device, and return it."""
        self.clip.to(device)
        return self

    def zero_shot(
        self, class_names: Sequence[str], template: str = TEMPLATE, *, scorer: str | Scorer = "template"
    ) -> "Classifier":
        """Return a classifier over classes, with texts embedded now.

        Args:
            class_names: in the order of the labels; lower case is taken, as in the papers' code.
            template: of the class prompts, with `{}` for the name.
            scorer: as `--scorer`: `template`, `ensemble`, `cupl:captions=FILE`, …

        Raises:
            UserError: fewer than two classes, a template without `{}`, or an unknown scorer.
        """
        names = (class_names,) if isinstance(class_names, str) else tuple(class_names)
        if len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise UserError("zero_shot needs the names of two classes or more: zero_shot(['cat', 'dog']).")
        check_template(template)
        chosen = _only(parse_scorers(scorer), "scorer", scorer) if isinstance(scorer, str) else scorer
        chosen = bind_captions(chosen, "", names)
        with working(self.clip), torch.no_grad():
            return Classifier(self, chosen.classifier(self.clip, names, template), chosen)


class Classifier:
    """A model with classes, alone or behind test-time defences. Called with pixels in [0, 1], `(B, 3, H, W)`, it
    returns logits `(B, K)`, differentiable in the pixels; images of another size than the model's are resized in it.
    """

    def __init__(
        self,
        model: Model | None,
        victim: ZeroShot,
        scorer: Scorer,
        chain: Chain = (),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            model: None for a function, which takes pixels of this `dtype`."""
        self.model, self.victim, self.scorer, self.chain, self.seed = model, victim, scorer, chain, seed
        self._dtype = dtype

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.victim.class_names

    @property
    def defense(self) -> str:
        """Label of its defences, `none` without any."""
        return chain_label(self.chain)

    def behind(self, defense: str | Chain, *, seed: int = 0) -> "Classifier":
        """Return this classifier behind test-time defences, as `--defense` names them: `ttc:eps=4/255`, `rn+tte`.

        Args:
            seed: of random defences; an image's draw depends on it and on the image's place alone.
        """
        added = _only(parse_defenses(defense), "defence", defense) if isinstance(defense, str) else defense
        chain = (*self.chain, *pinned(added))
        return Classifier(self.model, self.victim, self.scorer, chain, seed, self._dtype)

    def __call__(self, images: Tensor) -> Tensor:
        with working(self.victim.clip):
            return self.judge(range(len(images)))(images.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Precision that attacks compute in: that of the weights, or of a function's pixels, but at least fp32."""
        dtype = self._dtype if self.model is None else next(self.model.clip.model.parameters()).dtype
        return torch.promote_types(dtype, torch.float32)

    @property
    def is_random(self) -> bool:
        return self.scorer.random or is_random(self.chain)

    def judge(self, places: Sequence[int]) -> ZeroShot:
        """Return the classifier that decides on the images at these places."""
        keys = self._drawn(places)
        judge = self.scorer.bind(self.victim, keys, attacked=False)
        return Defended(judge, self.chain, keys) if self.chain else judge

    def target(self, places: Sequence[int], aim: Aim) -> ZeroShot:
        """Return the classifier that an attack sees."""
        keys = self._drawn(places)
        target = self.scorer.bind(self.victim, keys, attacked=True)
        through = aim.source or self.chain
        return target if not self.chain or aim == IGNORE else Defended(target, through, keys, aim)

    def _drawn(self, places: Sequence[int]) -> Tensor:
        return sample_keys(places, self.seed, "defense")


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """Result of an attack, on the caller's device and in the dtype of the caller's images.

    Attributes:
        images: adversarial images `(B, C, H, W)`; images that were wrong before the attack are unchanged.
        success: bool `(B,)`: the classifier is wrong about the image as it is in `images`, those included that it was
            wrong about before. `1 - success.float().mean()` is the robust accuracy.
        logits: the classifier's for `images`, `(B, K)`.
        steps: gradient steps taken, `(B,)`.
        queries: forward passes spent on each image, `(B,)`.
        clean_logits: the classifier's before the attack, `(B, K)`.
        labels: the true classes, `(B,)`.
        class_names: of the classifier; numbers for a function.
        attack: with its budget and all settings.
        clean: the images before the attack.
        classifier: which judged them.
    """

    images: Tensor
    success: Tensor
    logits: Tensor
    steps: Tensor
    queries: Tensor
    clean_logits: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    attack: Attack
    clean: Tensor = field(repr=False)
    classifier: Classifier = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def save(self, folder: str) -> SavedSet:
        """Write the images as a data set for `rayclip eval --data FOLDER`, `rayclip.evaluate` and other tools: PNG, and
        judged again as they are rounded to 8 bits. A set that was saved there before is replaced.

        Returns:
            the set's place, and how many successes survive rounding; its text says so.

        Raises:
            UserError: an attack on texts, or a folder with something else in it.
        """
        if self.attack.changes_texts or self.attack.gives_own_texts:
            raise UserError(f"{self.attack.name} changes texts, which a data set of images does not keep.")
        victim, model = self.classifier.victim, self.classifier.model
        judging = victim.function if isinstance(victim, FunctionClassifier) else victim.clip

        def predict(pixels: Tensor, places: Sequence[int]) -> Tensor:
            images = pixels.to(pixels.device if model is None else model.device, self.classifier.dtype)
            with working(judging if isinstance(judging, nn.Module) else None):
                return self.classifier.judge(places)(images).argmax(1)

        return save_adversarial(
            folder,
            self.images,
            self.labels,
            self.class_names,
            before_B=self.clean_logits.argmax(1),
            after_B=self.logits.argmax(1),
            predict=predict,
            clean_BCHW=self.clean,
            about={"attack": self.attack.label, "settings": self.attack.describe(), "defense": self.classifier.defense},
            budget=self.attack.eps if self.attack.needs_eps and self.attack.ball == "linf" else None,
        )


def attack(
    model: Classifier | Callable[[Tensor], Tensor],
    images: Any,
    labels: Any = None,
    attack: str | Attack = "pgd",
    *,
    eps: str | float | None = None,
    steps: int = 10,
    step_size: str | float | None = None,
    substitutes: str = "default",
    aim: str = "ignore",
    draws: int | None = None,
    seed: int = 0,
    resolution: Resolution = "native",
    batch_size: int = 128,
) -> AttackResult:
    """Attack images. Nothing of the caller's changes: the model comes back in its mode and with its gradients as they
    were, random numbers come from counters of their own, and `no_grad` around the call does not matter.

    Args:
        model: a classifier (`Model.zero_shot`, `Classifier.behind`), or any function from pixels `(B, C, H, W)` in
            [0, 1] to logits `(B, K)`; a `torch.nn.Module` runs in eval mode.
        images, labels: tensors, PIL images, lists of these (see `rayclip.api.pictures.PictureReader.read`), or a
            DataLoader of `(images, labels)`, whose results are all held in memory.
        attack: one attack with its settings, as `--attacks` names it: `pgd:steps=100`, `autoattack`, `bert`.
        eps: budget in pixel units, `"4/255"` or a number below 1 (in l_2 any length).
        steps, step_size, substitutes: of attacks that do not set their own.
        aim: how to attack a defended classifier: `ignore` (blindly), through the defence (`straight`, `bpda`, …), or
            through another defence, as `behind` names it.
        draws: of a random defence, averaged at each query of an attack through it.
        seed: of random starts; an image's start depends on it, on the attack and on the image's place alone.
        resolution: perturb images at their own size (`native`), or make PIL images as large as the model's input first.
        batch_size: images per forward pass.

    Raises:
        UserError: what was asked for cannot be meant, in one sentence: a budget of 8, pixels outside [0, 1], a label
            that is no class, images that do not fit, a model on another device.
    """
    if isinstance(model, Model):
        raise UserError("a model has no classes to attack: give model.zero_shot([...]).")
    if not callable(model):
        raise UserError(f"a {type(model).__name__} cannot be attacked: give a classifier, or a function of pixels.")
    chosen = choose_attack(attack, eps, steps=steps, step_size=step_size, substitutes=substitutes)
    towards = _only(parse_aims(aim, draws or DRAWS), "aim", aim)
    if towards != IGNORE and not (isinstance(model, Classifier) and model.chain):
        raise UserError(f"aim '{aim}' goes through a defence, and there is none: give classifier.behind('ttc').")
    clip = model.victim.clip if isinstance(model, Classifier) else None
    device, size = (None, None) if clip is None else (clip.device, clip.image_size)
    batches = PictureReader(device, size, resolution, batch_size).read(images, labels)
    with working(model if isinstance(model, nn.Module) else clip), torch.enable_grad():
        first = next(batches, None)
        if first is None:
            raise UserError("there are no images to attack: the DataLoader is empty.")
        run = _Run(model if isinstance(model, Classifier) else _classifier_of(model, first), chosen, towards, seed)
        parts = [run(batch) for batch in itertools.chain([first], batches)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return AttackResult(**columns, class_names=run.classifier.class_names, attack=run.attack, classifier=run.classifier)


def choose_attack(
    attack: str | Attack, eps: str | float | None, *, steps: int, step_size: str | float | None, substitutes: str
) -> Attack:
    """Return one attack with its budget, as the command line would."""
    chosen = attack
    if isinstance(chosen, str):
        chosen = _only(parse_attacks(chosen, attack_defaults(steps, step_size, substitutes)), "attack", chosen)
    return chosen.within(read_budget(eps, chosen.ball))


def read_budget(eps: str | float | None, norm: Norm = "linf", what: str = "eps") -> float | None:
    """Return a budget in pixel units, of `"4/255"` or a number."""
    return parse_budget(eps, what, norm) if isinstance(eps, str) else eps


@contextlib.contextmanager
def working(module: nn.Module | None) -> Iterator[None]:
    """Make a module ready to be attacked in the block, with exact arithmetic; afterwards all is as it was before."""
    records = torch.is_grad_enabled()
    with (
        exact_fp32(),
        frozen(module) if module is not None else contextlib.nullcontext(),
        torch.inference_mode(False),  # whose tensors no gradient may pass
        torch.set_grad_enabled(records),
    ):
        yield


class _Run:
    """An attack on one batch after the other of what a classifier is given."""

    def __init__(self, classifier: Classifier, attack: Attack, aim: Aim, seed: int) -> None:
        self.classifier, self._seed, self._done = classifier, seed, 0
        victim, scorer, names = classifier.victim, classifier.scorer, classifier.class_names
        several = scorer.random or is_random(aim.source or classifier.chain)
        self._aim = dataclasses.replace(aim, source=pinned(aim.source), draws=aim.draws if several else 1)
        if attack.gives_own_texts and not scorer.takes_own_texts:
            raise UserError(
                f"{attack.name} gives every image texts of its own, which scorer {scorer.name} cannot weigh."
            )
        bundled = classifier.model is not None and classifier.model.spec == "digits"
        attack = attack.with_default_substitutes(default_substitutes(bundled=bundled)).for_classes(len(names))
        attack = bind_captions(attack.pinned(), "", names)
        if classifier.model is not None:
            attack.check(classifier.model.clip)
            if victim.text_KD.device != classifier.model.device:
                raise UserError(f"the model has moved to {classifier.model.device} since: make its classifier anew.")
        # What breaks another classifier than the one that judges says little before the last step
        self.attack = attack.to_last_step() if classifier.chain or scorer.random else attack
        self._prompts = attack.prepare(victim)

    def __call__(self, batch: Labelled) -> dict[str, Tensor]:
        given, labels_B, home = batch
        check_labels(labels_B, len(self.classifier.class_names))
        places = range(self._done, self._done + len(given))
        self._done += len(given)
        images = given.to(self.classifier.dtype)
        images = images.clone() if images.is_inference() else images
        judge, target = self.classifier.judge(places), self.classifier.target(places, self._aim)
        with torch.no_grad():
            clean_logits = judge(images)
        keys = sample_keys(places, self._seed, self.attack.name).to(images.device)
        samples = Samples(images, labels_B, keys, todo_B=clean_logits.argmax(1) == labels_B)
        made = self.attack.run(target, samples, prompts=self._prompts)
        # In the caller's dtype, unchanged pixels to the bit; what rounding undoes is no success
        found = torch.where(made.images_BCHW == images, given, made.images_BCHW.to(given.dtype))
        with torch.no_grad():
            logits = made._replace(images_BCHW=found.to(images.dtype)).logits(judge, labels_B)
        _check_logits(clean_logits, logits)
        columns = {
            "images": found,
            "clean": given,
            "success": logits.argmax(1) != labels_B,
            "logits": logits,
            "steps": made.steps_B,
            "queries": made.queries_B,
            "clean_logits": clean_logits,
            "labels": labels_B,
        }
        return {name: column.detach().to(home) for name, column in columns.items()}


def _classifier_of(function: Callable[[Tensor], Tensor], batch: Labelled) -> Classifier:
    """Return a function as a classifier, with as many classes as it gives logits for the first image of a batch."""
    image = batch.images_BCHW[:1].clone()
    try:
        with torch.no_grad():
            logits = function(image)
    except RuntimeError as error:  # of shapes, dtypes and devices
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"the function does not take images of shape {tuple(image.shape)}, {image.dtype} on {image.device}: {said}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the function has to return logits (B, K) of two classes or more, not {shape} of one image.")
    return Classifier(None, FunctionClassifier(function, logits.shape[1], image.dtype), DEFAULT, dtype=image.dtype)


def _check_logits(*logits_BK: Tensor) -> None:
    """Raise if logits are no prediction."""
    for what, bad_B in find_faults(*logits_BK):
        if bad_B.any():
            raise UserError(f"the classifier gives {what}: that is no prediction.")


def _only(found: Sequence[T], noun: str, text: str) -> T:
    """Return the one thing that a text names."""
    if len(found) != 1:
        raise UserError(
            f"'{text}' names {len(found)} {noun}s: give one at a time, or use rayclip.evaluate for several."
        )
    return found[0]

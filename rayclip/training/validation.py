"""Validate a run on held-out images, and keep the weights of the best epoch beside the last.

Shapes: B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayclip.attacks import Attack, Samples
from rayclip.data import ImageSet, Resolution, batch_pixels
from rayclip.models import Clip, ZeroShot
from rayclip.models.clip import frozen
from rayclip.rng import sample_keys
from rayclip.training.config import TrainConfig
from rayclip.training.held_out import HeldOut
from rayclip.types import WORST

BEST = "best"  # folder of the best checkpoint, in that of the last


@dataclass
class Validator:
    """Judges the model of a run on held-out images, whose ranks divide them, and remembers the best weights.

    Attributes:
        history: results so far, each with `epoch` and `step`.
        best: the best one's weights, on the CPU; on rank 0 alone.
    """

    config: TrainConfig
    held: ImageSet
    rank: int
    world_size: int
    history: list[dict[str, float]] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    @property
    def settings(self) -> HeldOut:
        assert self.config.validate is not None
        return self.config.validate

    @property
    def attacks(self) -> Sequence[Attack]:
        return self.settings.attacks

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Return whether to validate after so many epochs of all."""
        return epoch % self.settings.every == 0 or epoch == epochs

    def run(self, clip: Clip, trained: Sequence[nn.Parameter], epoch: int, step: int) -> dict[str, float]:
        """Return accuracies in percent as `clean`, by attack and, of several, `worst`. All ranks call this."""
        found = self._measure(clip)
        before = self.best_of()
        self.history.append({"epoch": epoch, "step": step, **found})
        if self.rank == 0 and self.best_of() is not before:
            self.best = [p.detach().to("cpu", copy=True) for p in trained]
        return found

    def best_of(self) -> dict[str, float] | None:
        """Return the best result so far; None if there is none."""
        first = self.attacks[0].label_with_budget if self.attacks else "clean"
        return max(self.history, key=lambda each: (each[first], each["clean"], -each["epoch"]), default=None)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint's lineage says of its run's validation."""
        return {**self.settings.describe(), "images": len(self.held), "best": self.best_of(), "history": self.history}

    def state(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        self.history, self.best = state["history"], [x.cpu() for x in state["best"]] if self.rank == 0 else []

    def _measure(self, clip: Clip) -> dict[str, float]:
        config, names = self.config, ["clean", *(attack.label_with_budget for attack in self.attacks)]
        mine = np.arange(len(self.held))[self.rank :: self.world_size]
        right = torch.zeros(len(names) + 1, dtype=torch.float64, device=clip.device)  # the last: under all attacks
        at_once = max(1, config.recipe.batch_size // (self.world_size * config.accumulate))
        with frozen(clip):
            classifier = ZeroShot(clip, self.held.class_names, config.template)
            for positions in np.array_split(mine, -(-len(mine) // at_once)) if len(mine) else []:
                verdicts = self._judge(classifier, positions, config.resolution)
                right += torch.stack([*verdicts, torch.stack(verdicts).all(0)]).sum(1)
        if self.world_size > 1:
            torch.distributed.all_reduce(right)
        *each, worst = (100 * right / len(self.held)).tolist()
        return dict(zip(names, each, strict=True)) | ({WORST: worst} if len(self.attacks) > 1 else {})

    def _judge(self, classifier: ZeroShot, positions: np.ndarray, resolution: Resolution) -> list[Tensor]:
        """Return for the clean images and each attack which ones are right, as `rayclip eval` judges them, `(B,)`."""
        device = classifier.clip.device
        pixels = batch_pixels(self.held, positions.tolist(), resolution, classifier.clip.image_size)
        images = pixels.to(device).float() / 255
        labels = torch.from_numpy(self.held.labels[positions]).to(device)
        with torch.no_grad():
            clean = classifier(images).argmax(1) == labels
        verdicts, ids = [clean], self.held.ids[positions].tolist()
        for attack in self.attacks:
            keys = sample_keys(ids, self.config.seed, self.held.fingerprint, attack.name)
            found = attack.run(classifier, Samples(images, labels, keys, todo_B=clean))
            with torch.no_grad():
                verdicts.append(clean & (found.logits(classifier, labels).argmax(1) == labels))
        return verdicts

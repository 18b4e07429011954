"""The configuration of a training run: everything that its result depends on."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from rayclip import PROTOCOL
from rayclip.data import Names, Resolution
from rayclip.methods import Method, Recipe
from rayclip.models import TEMPLATE
from rayclip.models.resizing import Resize, check_resize
from rayclip.training.held_out import HeldOut
from rayclip.types import UserError

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of one fine-tuning run.

    Attributes:
        model, data: as on the command line (`load_model`, `open_data`).
        method: the loss, its settings and the attack it trains against.
        recipe: optimiser and schedule, the method's own unless overridden.
        total_steps: number of steps after which the run ends, if that is within its epochs; None runs all of them.
        eps_warmup: epochs in which the training attack's budget rises from 0 to `method.eps`, linearly in steps; its
            step size rises in the same way. 0 uses the full budget from the start.
        ema: decay of the weights' moving average, 0..1 (see `training.average`); 0 keeps the last step's weights.
        shots: images per class; None for all.
        seed: seed of the few-shot draw, the order of the batches and the attacks' random starts.
        resolution: `native` or `model` (see `data.images`).
        resize: how `native` images are resized inside the model's forward: `antialias` or `plain` (see
            `models.resizing`).
        names: spelling of the classes in the prompts (see `data.opening`).
        template: template of the class prompts.
        precision: `fp32`, or `bf16`: autocast, and attacks on a copy in fp16. `auto` is bf16 on a GPU and fp32 on a
            CPU; a driver that plans runs for workers resolves it beforehand (`distributed.resolve_precision`), as it is
            part of `digest`.
        model_fingerprint, data_fingerprint: fingerprints of `model` and `data` when the run was planned, so that a
            file that has changed since makes another run.
        accumulate: number of parts into which a worker splits its share of a batch to save memory.
        validate: how to validate on a held-out part of the training data; None trains on all of it.
        save_every_epochs, save_every_steps: when to checkpoint; 0 steps is never.
        data_workers: processes that decode images; 0 decodes in the training process. None: a Ray Train worker with a
            GPU takes its share of the node's cores less one, all others 0.
        compiled: whether attacks run on a compiled copy of the model (`models.fast`).
    """

    model: str
    data: str
    method: Method
    recipe: Recipe
    total_steps: int | None = None
    eps_warmup: float = 0.0
    ema: float = 0.0
    shots: int | None = None
    seed: int = 0
    resolution: Resolution = "native"
    resize: Resize = "antialias"
    names: Names = "curated"
    template: str = TEMPLATE
    precision: Precision = "auto"
    model_fingerprint: str = ""
    data_fingerprint: str = ""
    save_every_epochs: int = 1
    save_every_steps: int = 0
    data_workers: int | None = None
    compiled: bool = False
    accumulate: int = 1
    validate: HeldOut | None = None

    def __post_init__(self) -> None:
        check_resize(self.resize, self.resolution)
        if not 0 <= self.eps_warmup <= self.recipe.epochs:
            raise UserError(
                f"eps-warmup {self.eps_warmup:g} does not fit into a run of {self.recipe.epochs} epochs: write a "
                f"number of epochs from 0 to {self.recipe.epochs}."
            )
        if self.eps_warmup and self.method.prepares:
            raise UserError(
                f"{self.method.name} makes its adversarial images once, before training: leave --eps-warmup away."
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise UserError(f"total-steps {self.total_steps} is no length of a run: write a number from 1.")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema {self.ema:g} is no decay: write a number from 0 (off) to below 1, such as 0.999.")

    def decided(self, *, on_gpu: bool) -> Self:
        """Return the configuration with `auto` precision resolved for the device it will run on."""
        return self if self.precision != "auto" else replace(self, precision="bf16" if on_gpu else "fp32")

    def describe(self) -> dict[str, Any]:
        """Return the configuration as nested plain values, with the method's name, for lineage files."""
        described = asdict(replace(self, validate=None))
        del described["validate"]
        if self.total_steps is None:  # as before there was this setting
            del described["total_steps"]
        if self.validate is not None:
            described["validate"] = self.validate.describe()
        described["method"] = {"name": self.method.name, **self.method.describe()}
        return described

    def length(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the run."""
        whole = self.recipe.epochs * steps_per_epoch
        return whole if self.total_steps is None else min(self.total_steps, whole)

    def flat(self) -> dict[str, Any]:
        """Return the configuration as a flat dict with keys such as `method.eps`, for MLflow's params."""
        return dict(_flatten("", self.describe()))

    def digest(self) -> str:
        """Return a digest that is equal for runs that must give equal weights, up to rounding.

        When they checkpoint, how they load data, into how many parts they split batches and whether they compile does
        not enter.
        """
        free = ("save_every_epochs", "save_every_steps", "data_workers", "accumulate", "compiled")
        decisive = {k: v for k, v in self.describe().items() if k not in free}
        return hashlib.sha256(json.dumps([PROTOCOL, decisive], sort_keys=True).encode()).hexdigest()[:12]


def check_shares(images: int, batch_size: int, workers: int) -> None:
    """Raise a `UserError` if a worker would have no image of some batch.

    An epoch is cut into batches of nearly equal size (`data.sampling`), none of which is larger than `batch_size`.
    """
    if images < workers:
        raise UserError(f"{images} training images cannot be dealt out to {workers} workers: use fewer workers.")
    steps = -(-images // batch_size)
    smallest = images // steps
    if smallest >= workers:
        return
    remedy = "a larger --batch-size or fewer --workers" if batch_size < images else "fewer --workers"
    found = f"{steps} batches of {smallest} images or one more" if images % steps else f"batches of {smallest} images"
    raise UserError(
        f"--batch-size {batch_size} makes {found} of {images}, which cannot be dealt out to {workers} workers: use "
        f"{remedy}."
    )


def _flatten(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in values.items():
        items += _flatten(f"{prefix}{key}.", value) if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return items

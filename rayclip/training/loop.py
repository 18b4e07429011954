"""The train loop of one process, for every method.

No random state is kept between steps: the order of an epoch is derived from (seed, epoch), an attack's random start
from (seed, sample, step). A run that is resumed from a checkpoint therefore continues the same loss curve, and a run on
several workers divides the same global batches among them.
"""

import contextlib
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayclip.data import ImageSet, open_data
from rayclip.data.sampling import EpochSampler
from rayclip.methods import Batch, ClassTexts, Original
from rayclip.models import Clip, load_model
from rayclip.models.checkpoint import restore, save_checkpoint
from rayclip.models.clip import frozen
from rayclip.models.exact import use_exact_fp32
from rayclip.models.lora import Lora
from rayclip.rng import sample_keys
from rayclip.training.average import Average, set_weights
from rayclip.training.config import TrainConfig, check_shares
from rayclip.training.held_out import split
from rayclip.training.lineage import lineage
from rayclip.training.optimizer import choose_trainable, eps_share, learning_rate, make_optimizer
from rayclip.training.reading import TimedBatches, read_batches
from rayclip.training.step import LossOf, attack_and_backward, autocast_to, copy_to_attack
from rayclip.training.validation import BEST, Validator
from rayclip.types import check_same

STATE_FILE = "training_state.pt"
_REPORT_SECONDS = 3.0  # approximate time between two reports, each of which waits for the device
_REPORT_STEPS = 100  # maximum steps between two reports


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run.

    Attributes:
        seconds: since the last report.
        data_wait: share of them in which the loop waited for images, 0..1.
        curve: (step, metrics) of every step since the last report.
        validated: accuracies on held-out images, in percent, if it was validated after this step.
    """

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    images_per_second: float
    seconds: float
    data_wait: float
    curve: list[tuple[int, dict[str, float]]]
    validated: dict[str, float] = field(default_factory=dict)


class Host(Protocol):
    """The environment that the train loop runs in: a single process, or a Ray Train worker."""

    rank: int
    world_size: int
    device: torch.device

    def resume_from(self) -> contextlib.AbstractContextManager[Path | None]:
        """Return a context with a local folder of the latest checkpoint; None if there is no checkpoint yet."""

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        """Report progress. Every rank calls this at the same steps; rank 0 passes `save` if a checkpoint is due."""


def train(config: TrainConfig, host: Host) -> Clip:
    """Fine-tune `config.model`; return the model in its final state, in eval mode.

    Raises:
        UserError: bad model or data, more shots than a class has, or batches of fewer images than workers.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    use_exact_fp32()
    config = config.decided(on_gpu=host.device.type == "cuda")
    clip = load_model(config.model, host.device).with_resize(config.resize)
    data, held = split(open_data(config.data, "train", config.names), config.shots, config.seed, config.validate)
    if config.data_fingerprint:
        check_same("data", config.data, data.fingerprint, config.data_fingerprint)
    if config.model_fingerprint:
        check_same("model", config.model, clip.fingerprint(), config.model_fingerprint)
    check_shares(len(data), config.recipe.batch_size, host.world_size)
    return _Run(config, host, config.method.wrap_model(clip, config.seed), data, held).go()


class _Run:
    def __init__(
        self, config: TrainConfig, host: Host, clip: Clip, data: ImageSet, held: ImageSet | None = None
    ) -> None:
        self.config, self.host, self.clip, self.data = config, host, clip, data
        self.method, self.recipe = config.method, config.recipe
        clip.bound_scale()
        # Copied before a resume changes the weights, and before any of them is trainable
        base = copy.deepcopy(clip).eval().requires_grad_(False) if self.method.needs_original else None
        self.trainable = choose_trainable(clip, self.method)
        self.lora = None if self.method.lora is None else Lora(clip, self.method.lora, config.seed)
        if self.lora is not None:
            self.trainable = self.lora.factors
        self.auxiliary = self.method.auxiliary(clip, config.seed).to(host.device)
        self.optimizer = make_optimizer(self.recipe, [*self.trainable, *self.auxiliary.parameters()])
        self.sampler = EpochSampler(
            count=len(data),
            batch_size=self.recipe.batch_size,
            seed=config.seed,
            rank=host.rank,
            world_size=host.world_size,
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.total_steps = config.length(self.steps_per_epoch)
        self.step, self._seconds = 0, 0.0
        self.validator = None if held is None else Validator(config, held, host.rank, host.world_size)
        last = self._resume()
        self.average = Average(self.trainable, config.ema) if config.ema else None
        if last is not None:
            self._set(last)
        prompts = self.method.prompts(data.class_names, clip.template or config.template)
        self.texts = ClassTexts(clip, prompts, trainable=self.method.trains_texts)
        copied = functools.partial(copy_to_attack, precision=config.precision, compiled=config.compiled)
        self.attacked = copied(clip)
        self.original = None
        if base is not None:
            texts = ClassTexts(base, prompts, trainable=False)
            self.original = Original(clip=base, texts=texts, copied=copied(base))
        self.prepared_ND = self._prepare() if self.method.prepares else None
        self.module: nn.Module = LossOf(clip, self.method, self.auxiliary)
        if host.world_size > 1:
            on_gpu = host.device.type == "cuda"
            self.module = DistributedDataParallel(self.module, device_ids=[host.device] if on_gpu else None)
        self._pending: list[dict[str, Tensor]] = []
        self._report_at = self.step + 1
        self._batches = TimedBatches(self._load(map(self.sampler.share, self._rest())))
        self._clock, self._images = time.monotonic(), 0

    def go(self) -> Clip:
        for pixels, positions in self._batches:
            epoch = self.step // self.steps_per_epoch
            self._train_step(pixels, positions, self.sampler.batch_sizes[self.step % self.steps_per_epoch])
            if self._pending_due():
                self._report(epoch)
        if self.average is not None:
            self._set(self.average.values)
        return self.clip.eval()

    def _train_step(self, pixels_u8: Tensor, positions: Tensor, total: int) -> None:
        batch = replace(self._batch(pixels_u8, positions, total, "train", self.step), original=self.original)
        if self.prepared_ND is not None:
            batch = replace(batch, prepared_BD=self.prepared_ND[positions.to(self.host.device, non_blocking=True)])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        method = self.method.weakened(eps_share(self.config.eps_warmup * self.steps_per_epoch, self.step))
        autocast = functools.partial(autocast_to, self.config.precision, self.host.device)
        parts = self.config.accumulate
        metrics = attack_and_backward(self.module, self.clip, method, batch, parts, autocast, self.attacked)
        if self.lora is not None:
            self.lora.take_gradients()
        self.optimizer.step()
        if self.lora is not None:
            self.lora.apply()
        self.clip.bound_scale()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self._pending.append(metrics)
        self._images += total

    def _rest(self) -> Iterator[np.ndarray]:
        """Yield the global batches of all epochs, from the current step on."""
        begun, done = divmod(self.step, self.steps_per_epoch)
        epochs = range(begun, self.recipe.epochs)
        batches = (self.sampler.global_batches(epoch, done=done if epoch == begun else 0) for epoch in epochs)
        yield from itertools.islice(itertools.chain.from_iterable(batches), self.total_steps - self.step)

    def _load(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels (uint8) and positions of the batches, which hold this rank's own positions."""
        return read_batches(
            self.data,
            batches,
            resolution=self.config.resolution,
            image_size=self.clip.image_size,
            workers=self.config.data_workers or 0,
            pin_memory=self.host.device.type == "cuda",
        )

    def _batch(self, pixels_u8: Tensor, positions: Tensor, total: int, *use: object) -> Batch:
        """Return the batch of samples at these positions, with their random keys for this use."""
        device = self.host.device
        ids = self.data.ids[positions.numpy()]
        return Batch(
            pixels_BCHW=pixels_u8.to(device, non_blocking=True).float() / 255,
            labels_B=torch.from_numpy(self.data.labels[positions.numpy()]).to(device, non_blocking=True),
            keys_B=sample_keys(ids.tolist(), self.config.seed, *use).to(device, non_blocking=True),
            texts=self.texts,
            total=total,
        )

    def _prepare(self) -> Tensor:
        """Return `Method.prepare` of every image, `(N, D)`; each rank computes its share."""
        mine = self.sampler.share(np.arange(len(self.data)))
        at_once = max(1, self.recipe.batch_size // (self.host.world_size * self.config.accumulate))
        rows: list[Tensor] = []
        places: list[Tensor] = []
        for pixels, positions in self._load(np.array_split(mine, -(-len(mine) // at_once))):
            batch = self._batch(pixels, positions, len(positions), "prepare")
            with autocast_to(self.config.precision, self.host.device), frozen(self.clip):
                rows.append(self.method.prepare(self.attacked or self.clip, batch).float())
            places.append(positions)
        table_ND = rows[0].new_zeros(len(self.data), rows[0].shape[1])
        table_ND[torch.cat(places).to(table_ND.device)] = torch.cat(rows)
        if self.host.world_size > 1:
            torch.distributed.all_reduce(table_ND)
        return table_ND

    def _checkpoint_due(self) -> bool:
        every = self.config.save_every_steps
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        at_epoch = in_epoch == 0 and epoch % self.config.save_every_epochs == 0
        return at_epoch or self.step == self.total_steps or bool(every and self.step % every == 0)

    def _validation_due(self) -> bool:
        if self.validator is None or self.step == self.total_steps:
            return self.validator is not None
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        return in_epoch == 0 and self.validator.is_due(epoch, self.recipe.epochs)

    def _pending_due(self) -> bool:
        return self._checkpoint_due() or self._validation_due() or self.step >= self._report_at

    def _set(self, values: Sequence[Tensor]) -> None:
        set_weights(self.trainable, values)
        if self.lora is not None:
            self.lora.apply()

    @contextlib.contextmanager
    def _weights(self, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Give the model other weights for the block; yield its own."""
        last = [p.detach().clone() for p in self.trainable]
        self._set(values)
        try:
            yield last
        finally:
            self._set(last)

    def _averaged(self) -> contextlib.AbstractContextManager[list[Tensor] | None]:
        return contextlib.nullcontext() if self.average is None else self._weights(self.average.values)

    def _report(self, epoch: int) -> None:
        names = list(self._pending[0])
        table = torch.stack([torch.stack([m[name].float() for name in names]) for m in self._pending])
        spent = torch.tensor([time.monotonic() - self._clock, self._batches.take()], device=table.device)
        if self.host.world_size > 1:  # average over ranks, so that all of them report at the same steps
            for tensor in (table, spent):
                torch.distributed.all_reduce(tensor)
                tensor /= self.host.world_size
        seconds, waited = max(spent[0].item(), 1e-9), spent[1].item()
        wait = max(1, round(_REPORT_SECONDS * len(self._pending) / max(seconds, 1e-3)))
        self._report_at = self.step + min(wait, _REPORT_STEPS)
        first = self.step - len(self._pending) + 1
        curve = [(first + i, dict(zip(names, row, strict=True))) for i, row in enumerate(table.tolist())]
        for step, metrics in curve:
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(
                    f"the loss of step {step} (epoch {epoch + 1}) is {metrics['loss']}: lower the "
                    "learning rate, or use precision fp32."
                )
        rate, self._loss = self._images / seconds, curve[-1][1]["loss"]
        self._seconds += seconds
        validated: dict[str, float] = {}
        if self.validator is not None and self._validation_due():
            with self._averaged():
                validated = self.validator.run(self.clip, self.trainable, epoch + 1, self.step)
        self._clock, self._images = time.monotonic(), 0
        self._pending = []
        progress = Progress(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch + 1,
            epochs=self.recipe.epochs,
            loss=self._loss,
            images_per_second=rate,
            seconds=seconds,
            data_wait=waited / seconds,
            curve=curve,
            validated=validated,
        )
        save = self._save if self.host.rank == 0 and self._checkpoint_due() else None
        self.host.report(progress, save)

    def _save(self, folder: Path) -> None:
        found = lineage(self.config, self.data, self.clip, self.step, self.total_steps)
        state: dict[str, Any] = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        found |= {"loss": self._loss, "seconds": round(self._seconds, 3)}
        state["seconds"] = self._seconds
        if self.validator is not None:
            found["validation"], state["validation"] = self.validator.record(), self.validator.state()
            if self.step == self.total_steps:
                with self._weights(self.validator.best):
                    save_checkpoint(self.clip, folder / BEST, {**found, "weights": "best epoch by validation"})
        with self._averaged() as state["last"]:
            save_checkpoint(self.clip, folder, found)
            state["auxiliary"] = self.auxiliary.state_dict()
            state["lora"] = None if self.lora is None else [p.detach().clone() for p in self.lora.factors]
        torch.save(state, folder / STATE_FILE)

    def _resume(self) -> list[Tensor] | None:
        """Restore model and optimiser from the latest checkpoint, if there is one.

        Returns the last step's weights if the checkpoint's own weights are averaged; else None.
        """
        with self.host.resume_from() as folder:
            if folder is None:
                return None
            state = torch.load(folder / STATE_FILE, map_location=self.host.device, weights_only=True)
            if self.lora is None:
                restore(self.clip, folder)
            else:
                self._set(state["lora"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.auxiliary.load_state_dict(state.get("auxiliary", {}))
            self.step, self._seconds = state["step"], state.get("seconds", 0.0)
            if self.validator is not None:
                self.validator.restore(state["validation"])
            return state["last"]

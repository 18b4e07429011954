"""The train loop of one process, for every method.

No random state is kept between steps: the order of an epoch is derived from (seed, epoch), an attack's random start
from (seed, sample, step). A run that is resumed from a checkpoint therefore continues the same loss curve, and a run on
several workers divides the same global batches among them.
"""

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayclip import __version__
from rayclip.data import ImageSet, few_shot, open_data
from rayclip.data.sampling import EpochSampler
from rayclip.methods import Batch, ClassTexts, Method, Original, Recipe
from rayclip.models import Clip, load_model
from rayclip.models.checkpoint import restore, save_checkpoint
from rayclip.models.clip import frozen
from rayclip.models.exact import has_batch_norm, use_exact_fp32
from rayclip.models.fast import fast_copy, refresh
from rayclip.rng import sample_keys
from rayclip.training.average import Average, set_weights
from rayclip.training.config import TrainConfig, check_shares
from rayclip.training.reading import read_batches
from rayclip.types import UserError, check_same

STATE_FILE = "training_state.pt"
_REPORT_SECONDS = 3.0  # approximate time between two reports, each of which waits for the device
_REPORT_STEPS = 100  # maximum steps between two reports


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run. `curve` holds (step, metrics) of every step since the last report."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    images_per_second: float
    curve: list[tuple[int, dict[str, float]]]


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
    data = few_shot(open_data(config.data, "train", config.names), config.shots, config.seed)
    if config.data_fingerprint:
        check_same("data", config.data, data.fingerprint, config.data_fingerprint)
    if config.model_fingerprint:
        check_same("model", config.model, clip.fingerprint(), config.model_fingerprint)
    check_shares(len(data), config.recipe.batch_size, host.world_size)
    return _Run(config, host, config.method.wrap_model(clip, config.seed), data).go()


class _Run:
    def __init__(self, config: TrainConfig, host: Host, clip: Clip, data: ImageSet) -> None:
        self.config, self.host, self.clip, self.data = config, host, clip, data
        self.method, self.recipe = config.method, config.recipe
        clip.bound_scale()
        # Copied before a resume changes the weights, and before any of them is trainable
        base = copy.deepcopy(clip).eval().requires_grad_(False) if self.method.needs_original else None
        self.trainable = choose_trainable(clip, self.method)
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
        self.total_steps = self.steps_per_epoch * self.recipe.epochs
        self.step = 0
        last = self._resume()
        self.average = Average(self.trainable, config.ema) if config.ema else None
        if last is not None:
            set_weights(self.trainable, last)
        prompts = self.method.prompts(data.class_names, clip.template or config.template)
        self.texts = ClassTexts(clip, prompts, trainable=self.method.trains_texts)
        self.attacked = copy_to_attack(clip, config.precision)
        self.original = None
        if base is not None:
            texts = ClassTexts(base, prompts, trainable=False)
            self.original = Original(clip=base, texts=texts, copied=copy_to_attack(base, config.precision))
        self.prepared_ND = self._prepare() if self.method.prepares else None
        self.module: nn.Module = LossOf(clip, self.method, self.auxiliary)
        if host.world_size > 1:
            on_gpu = host.device.type == "cuda"
            self.module = DistributedDataParallel(self.module, device_ids=[host.device] if on_gpu else None)
        self._pending: list[dict[str, Tensor]] = []
        self._report_at = self.step + 1
        self._clock, self._images = time.monotonic(), 0

    def go(self) -> Clip:
        for pixels, positions in self._load(map(self.sampler.share, self._rest())):
            epoch = self.step // self.steps_per_epoch
            self._train_step(pixels, positions, self.sampler.batch_sizes[self.step % self.steps_per_epoch])
            if self._pending_due():
                self._report(epoch)
        if self.average is not None:
            set_weights(self.trainable, self.average.values)
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
        self.optimizer.step()
        self.clip.bound_scale()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self._pending.append(metrics)
        self._images += total

    def _rest(self) -> Iterator[np.ndarray]:
        """Yield the global batches of all epochs, from the current step on."""
        begun, done = divmod(self.step, self.steps_per_epoch)
        for epoch in range(begun, self.recipe.epochs):
            yield from self.sampler.global_batches(epoch, done=done if epoch == begun else 0)

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

    def _pending_due(self) -> bool:
        return self._checkpoint_due() or self.step >= self._report_at

    def _report(self, epoch: int) -> None:
        names = list(self._pending[0])
        table = torch.stack([torch.stack([m[name].float() for name in names]) for m in self._pending])
        seconds = torch.tensor(time.monotonic() - self._clock, device=table.device)
        if self.host.world_size > 1:  # average over ranks, so that all of them report at the same steps
            for tensor in (table, seconds):
                torch.distributed.all_reduce(tensor)
                tensor /= self.host.world_size
        wait = max(1, round(_REPORT_SECONDS * len(self._pending) / max(seconds.item(), 1e-3)))
        self._report_at = self.step + min(wait, _REPORT_STEPS)
        first = self.step - len(self._pending) + 1
        curve = [(first + i, dict(zip(names, row, strict=True))) for i, row in enumerate(table.tolist())]
        for step, metrics in curve:
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(
                    f"the loss of step {step} (epoch {epoch + 1}) is {metrics['loss']}: lower the "
                    "learning rate, or use precision fp32."
                )
        rate = self._images / max(seconds.item(), 1e-9)
        self._clock, self._images = time.monotonic(), 0
        self._pending = []
        progress = Progress(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch + 1,
            epochs=self.recipe.epochs,
            loss=curve[-1][1]["loss"],
            images_per_second=rate,
            curve=curve,
        )
        save = self._save if self.host.rank == 0 and self._checkpoint_due() else None
        self.host.report(progress, save)

    def _save(self, folder: Path) -> None:
        with self.average.in_place() if self.average is not None else contextlib.nullcontext() as last:
            found = lineage(self.config, self.data, self.step, self.total_steps)
            save_checkpoint(self.clip, folder, {**found, **_made_on(self.clip)})
        parts = {"optimizer": self.optimizer.state_dict(), "auxiliary": self.auxiliary.state_dict()}
        state = {"step": self.step, "last": last, **parts}
        torch.save(state, folder / STATE_FILE)

    def _resume(self) -> list[Tensor] | None:
        """Restore model and optimiser from the latest checkpoint, if there is one.

        Returns the last step's weights if the checkpoint's own weights are averaged; else None.
        """
        with self.host.resume_from() as folder:
            if folder is None:
                return None
            restore(self.clip, folder)
            state = torch.load(folder / STATE_FILE, map_location=self.host.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.auxiliary.load_state_dict(state.get("auxiliary", {}))
            self.step = state["step"]
            return state["last"]


def attack_and_backward(
    module: nn.Module,
    clip: Clip,
    method: Method,
    batch: Batch,
    parts: int = 1,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    attacked: Clip | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of this worker's batch to the parameters; return the metrics.

    The batch is split into parts, so that the memory is that of one part. A loss that compares samples needs the whole
    batch at once; in that case the encoders work part by part instead, twice.

    The model is in eval mode for the attack and for the loss: BatchNorm keeps the statistics of the loaded model (its
    scale and shift are trained), and dropout is off. A sample's contribution to the gradient then depends on no other
    sample and on no random state, and a batch in parts, or on several workers, gives exactly the result of the whole
    batch. Synchronised statistics would make workers agree with each other, but not parts with the whole batch, nor the
    attack, which takes the statistics as fixed, with the loss.

    Args:
        module: `LossOf` the method, with or without DDP around it.
        parts: number of parts of the batch.
        autocast: makes the context in which attack and loss are computed.
        attacked: the model's copy that the attack runs on (`copy_to_attack`), with its weights of now; None for itself.
    """
    if attacked is not None:
        refresh(attacked)
    attacked = attacked or clip
    module.eval()
    whole = method.compares_samples
    chunk = -(-len(batch.labels_B) // parts) if whole and parts > 1 else 0
    todo = [batch] if whole else batch.split(parts)
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(todo):
        alone = isinstance(module, DistributedDataParallel) and i < len(todo) - 1  # workers sync only at the last part
        chunks = clip.in_chunks(chunk), attacked.in_chunks(chunk)
        with chunks[0], chunks[1], module.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with autocast():
                with frozen(clip):
                    part = method.attack(attacked, part)
                loss, metrics = module(part)
            loss.backward()
        sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
    return sums


def copy_to_attack(clip: Clip, precision: str) -> Clip | None:
    """Return a reduced copy of a model for attacks; None for runs in fp32, and for towers that cannot be copied.

    It is in fp16, an eighth of whose rounding errors bf16 has: an attack of few steps in bf16 is weaker by 1 %.
    """
    with contextlib.suppress(UserError):
        return fast_copy(clip, "fp16") if precision == "bf16" else None
    return None


class LossOf(nn.Module):
    """A method's loss as a module, since DDP prepares its gradient reduction in the module's forward."""

    def __init__(self, clip: Clip, method: Method, auxiliary: nn.Module | None = None) -> None:
        super().__init__()
        self.clip, self.method, self.auxiliary = clip, method, auxiliary

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method.loss(self.clip, replace(batch, auxiliary=self.auxiliary))


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: warm-up, then the schedule (`Recipe`)."""
    written = recipe.warmup_steps + recipe.warmup_epochs * total_steps // recipe.epochs
    warmup = written if recipe.warmup_whole else min(written, total_steps // 10)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup if recipe.warmup_lr is None else recipe.warmup_lr
    done = (step - warmup) / max(1, total_steps - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return recipe.lr * left[recipe.schedule]


def eps_share(warmup_steps: float, step: int) -> float:
    """Return the fraction of its budget that the training attack uses at a step, counted from 0."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def make_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Fused: one pass over the memory, which on a CPU takes a tenth of the time of one pass per term
    shared: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **shared)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(parameters, betas=recipe.betas, eps=recipe.adam_eps, **shared)


def lineage(config: TrainConfig, data: ImageSet, step: int, total_steps: int) -> Mapping[str, Any]:
    """Return the contents of a checkpoint's `rayclip.json`; the checkpoint is final if `step` equals `total_steps`."""
    return {
        "rayclip": __version__,
        "step": step,
        "total_steps": total_steps,
        "weights": f"moving average, decay {config.ema:g}" if config.ema else "last step",
        "digest": config.digest(),
        "config": config.describe(),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "images": len(data),
            "class_names": list(data.class_names),
        },
    }


def _made_on(clip: Clip) -> dict[str, str]:
    """Return more facts for readers of a checkpoint, which are not part of its identity: device, torch, BatchNorm."""
    on_gpu = clip.device.type == "cuda"
    found = {"device": torch.cuda.get_device_name(clip.device) if on_gpu else clip.device.type}
    found["torch"] = str(torch.__version__)
    return found | ({"batch_norm": "statistics of the base model, frozen"} if has_batch_norm(clip) else {})


def choose_trainable(clip: Clip, method: Method) -> list[nn.Parameter]:
    """Enable gradients of the parameters that the method trains; return these parameters."""
    clip.requires_grad_(False)
    chosen = clip.parameters_of(method.trains)
    for p in chosen:
        p.requires_grad_(True)
    return chosen


def autocast_to(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    bf16 = precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()

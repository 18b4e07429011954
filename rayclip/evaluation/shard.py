"""Evaluate one shard: run the attack on the model and turn the results into verdicts. No other module does this.

Shapes: B batch, K classes.
"""

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayclip.attacks import Samples
from rayclip.attacks.geometry import margin
from rayclip.data import ImageSet, Resolution, batch_pixels, open_data
from rayclip.defenses import IGNORE, Defended
from rayclip.evaluation.cell import Cell
from rayclip.evaluation.confirm import run_confirmed
from rayclip.evaluation.costs import Hardware, timing
from rayclip.evaluation.examples import keep_examples, prepare_texts
from rayclip.evaluation.plan import Shard
from rayclip.evaluation.schedule import KEPT
from rayclip.models import Clip, ZeroShot, fast_copy, load_model
from rayclip.models.exact import use_exact_fp32
from rayclip.models.scorers import Scorer
from rayclip.rng import sample_keys, subkeys
from rayclip.store import Store
from rayclip.types import UserError, check_same

K = TypeVar("K")
V = TypeVar("V")

_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ROOM = "use fewer workers on a GPU (--gpus-per-worker), a larger GPU, or a smaller model"


class Cache(OrderedDict[K, V]):
    """The most recently used values, as many as a worker keeps loaded."""

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        if key not in self:
            self[key] = make()
            while len(self) > KEPT:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class Done(NamedTuple):
    """The outcome of a shard: samples that are right before and after the attack, seconds of loading and running."""

    right: int
    samples: int
    loading: float
    seconds: float


class Evaluator:
    """Evaluator of shards: writes their result files and keeps models, class embeddings and data sets loaded.

    Args:
        device: where models run; they judge in fp32 with TF32 off.
        batch_size: images per forward; halved for a model if memory is short.
        compiled: whether to attack a compiled copy of the model (`models.fast`).
        hardware: to record in the results; None is this process's.
        given: models in memory by specification, on this device, which are not loaded.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device | str = "cpu",
        batch_size: int = 128,
        *,
        compiled: bool = False,
        hardware: Hardware | None = None,
        given: Mapping[str, Clip] = MappingProxyType({}),
    ) -> None:
        self.store, self.device, self.batch_size, self._compiled = store, torch.device(device), batch_size, compiled
        self.hardware, self._given = hardware or Hardware.here(self.device), given
        self._fits: dict[str, int] = {}  # batch sizes by model, for models whose batches had to be halved
        use_exact_fp32()
        self._models, self._fast_models = Cache[str, Clip](), Cache[tuple[str, str], Clip]()
        self._victims, self._fast_victims = Cache[tuple[str, ...], ZeroShot](), Cache[tuple[str, ...], ZeroShot]()
        self._data, self._prompts = Cache[str, ImageSet](), Cache[str, tuple[str, ...]]()

    def run(self, shard: Shard, batch_size: int | None = None, *, keep: bool = True) -> Done:
        """Evaluate and write a shard.

        Args:
            batch_size: maximum images per forward, for this shard.
            keep: False writes no verdicts, to measure the time only.

        Raises:
            UserError: not even one image fits into memory; or the model or data have changed since they were planned.
            FloatingPointError: the model's logits are not finite, or equal for all classes.
        """
        cell, positions = shard.cell, shard.positions
        began = time.perf_counter()
        data, victim, prompts = self._load(cell)
        loaded = time.perf_counter()
        parts, start = [], 0
        size = min(self._fits.get(cell.model_fingerprint, self.batch_size), batch_size or self.batch_size)
        read = _Reader(data, cell.protocol.resolution, victim.clip.image_size, pin=self.device.type == "cuda")
        while start < len(positions):
            now = positions[start : start + size]
            try:
                pixels = read(now, then=positions[start + size : start + 2 * size])
                parts.append(self._batch(cell, data, victim, prompts, now, pixels, keep=keep))
                start += size
                continue
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"not even one image of '{cell.dataset}' under {cell.attack_label} fits into {self.hardware} "
                        f"beside model '{cell.model}': {_ROOM}."
                    ) from error
            # Outside the except block: its error keeps the batch's tensors alive
            size = self._fits[cell.model_fingerprint] = max(1, min(size, len(now)) // 2)
            _free_memory(self._compiled)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        right = (columns["clean_pred"] == columns["label"]) & (columns["adv_pred"] == columns["label"])
        done = Done(int(right.sum()), len(positions), loaded - began, time.perf_counter() - loaded)
        if keep:
            self.store.write_table(shard.name, columns, timing(done.seconds, self.hardware))
        return done

    def _load(self, cell: Cell) -> tuple[ImageSet, ZeroShot, tuple[str, ...] | None]:
        """Load a cell's data, classifier and adversarial prompts; drop other models if memory is short."""
        while True:
            try:
                victim = self._victim(cell, cell.scorer)
                return self._images(cell), victim, self._adversarial_prompts(cell, victim)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if not self._models.keys() - {cell.model_fingerprint}:
                    raise UserError(f"model '{cell.model}' does not fit into {self.hardware}: {_ROOM}.") from error
            for cache in (self._models, self._victims, self._fast_models, self._fast_victims):
                cache.clear()
            _free_memory(self._compiled)

    def _batch(
        self,
        cell: Cell,
        data: ImageSet,
        victim: ZeroShot,
        prompts: tuple[str, ...] | None,
        positions: Sequence[int],
        pixels: Tensor,
        *,
        keep: bool = True,
    ) -> dict[str, np.ndarray]:
        ids = data.ids[list(positions)]
        labels = torch.from_numpy(data.labels[list(positions)]).to(self.device)
        images = pixels.to(self.device, non_blocking=True).float() / 255
        # A sample's noise depends on the attack's kind, not on its other settings: with the same start for every eps
        # and number of steps, curves over them are smooth.
        keys = sample_keys(ids.tolist(), cell.protocol.seed, cell.data_fingerprint, cell.attack.name)
        judge, target, fast = self._classifiers(cell, victim, ids)
        with torch.no_grad():
            clean_logits = judge(images)
        samples = Samples(images, labels, keys, todo_B=clean_logits.argmax(1) == labels)
        if fast is None:
            result = cell.attack.run(target, samples, eps=cell.eps or 0.0, prompts=prompts)
        else:
            result = run_confirmed(cell.attack, target, fast, samples, eps=cell.eps or 0.0, prompts=prompts)
        with torch.no_grad():
            adv_logits = result.logits(judge, labels)
            if cell.judgements > 1:
                judges = [self._classifiers(cell, victim, ids, number)[0] for number in range(1, cell.judgements)]
                each = torch.stack([adv_logits, *(result.logits(other, labels) for other in judges)])
                right_share = each.argmax(2).eq(labels).float().mean(0)
                lowest = torch.stack([margin(logits, labels) for logits in each]).argmin(0)
                adv_logits = each[lowest, torch.arange(len(labels), device=labels.device)]
        self._check_logits(cell, ids, clean_logits, adv_logits)
        delta = (result.images_BCHW - images).flatten(1)
        columns = {
            "position": torch.tensor(positions),
            "sample_id": torch.from_numpy(ids),
            "label": labels,
            "clean_pred": clean_logits.argmax(1),
            "adv_pred": adv_logits.argmax(1),
            "clean_margin": margin(clean_logits, labels),
            "adv_margin": margin(adv_logits, labels),
            "clean_confidence": clean_logits.softmax(1).amax(1),
            "adv_confidence": adv_logits.softmax(1).amax(1),
            "steps": result.steps_B,
            "queries": result.queries_B,
            "linf": delta.abs().amax(1),
            "l2": delta.norm(dim=1),
            **({} if result.part_B is None else {"part": result.part_B}),
            **({} if cell.judgements == 1 else {"right_share": right_share}),
        }
        verdicts = {name: column.cpu().numpy() for name, column in columns.items()}
        if keep and 0 in positions:
            keep_examples(
                self.store,
                f"cells/{cell.id}/examples",
                victim,
                images_BCHW=images,
                result=result,
                verdicts=verdicts,
                prompts=prompts,
                eps=cell.eps or 0.0,
            )
        return verdicts

    def _classifiers(
        self, cell: Cell, victim: ZeroShot, ids: np.ndarray, judgement: int = 0
    ) -> tuple[ZeroShot, ZeroShot, ZeroShot | None]:
        """Return for these samples the judging classifier, the attacked one, and a fast copy of the latter or None.
        Each `judgement` has draws of its own."""
        drawn = sample_keys(ids.tolist(), cell.protocol.seed, cell.data_fingerprint, "defense")
        drawn = subkeys(drawn, f"judgement {judgement}") if judgement else drawn
        judge = cell.scorer.bind(victim, drawn, attacked=False)
        attacked = self._victim(cell, cell.attacked)

        def aimed(classifier: ZeroShot) -> ZeroShot:
            target = cell.attacked.bind(classifier, drawn, attacked=True)
            ignored = not cell.defense or cell.aim == IGNORE
            return target if ignored else Defended(target, cell.defense, drawn, cell.aim)

        fast = self._fast(cell, attacked)
        judge = Defended(judge, cell.defense, drawn) if cell.defense else judge
        return judge, aimed(attacked), None if fast is None else aimed(fast)

    @staticmethod
    def _check_logits(cell: Cell, ids: np.ndarray, *logits_BK: Tensor) -> None:
        """Raise if logits are not finite or all equal: a model without predictions must not count as robust."""
        for what, bad in (
            ("logits that are not finite", [~z.isfinite().all(1) for z in logits_BK]),
            ("every class the same logit", [z.amax(1) == z.amin(1) for z in logits_BK]),
        ):
            bad_B = torch.stack(bad).any(0)
            if bad_B.any():
                raise FloatingPointError(
                    f"model '{cell.model}' gives {what} on '{cell.dataset}' under {cell.attack_label}, first for "
                    f"sample {ids[int(bad_B.nonzero()[0])]}: that is no prediction."
                )

    def _images(self, cell: Cell) -> ImageSet:
        def load() -> ImageSet:
            data = open_data(cell.data, "test")
            check_same("data", cell.data, data.fingerprint, cell.data_fingerprint)
            return data

        return self._data.get_or_make(cell.data_fingerprint, load)

    def _victim(self, cell: Cell, scorer: Scorer) -> ZeroShot:
        def load() -> Clip:
            clip = self._given[cell.model] if cell.model in self._given else load_model(cell.model, self.device)
            check_same("model", cell.model, clip.fingerprint(), cell.model_fingerprint)
            return clip

        def make() -> ZeroShot:
            # A view of the loaded model, so that cells with another resize can share the weights
            clip = self._models.get_or_make(cell.model_fingerprint, load).with_resize(cell.protocol.resize)
            return scorer.classifier(clip, cell.class_names, cell.protocol.template)

        return self._victims.get_or_make((cell.model_fingerprint, *_classifier_key(cell, scorer)), make)

    def _fast(self, cell: Cell, attacked: ZeroShot) -> ZeroShot | None:
        """Return a fast copy of the attacked classifier; None if the attack runs on the model itself."""
        compiled = self._compiled and cell.attack.needs_eps
        if cell.precision == "fp32" and not compiled:
            return None
        model = (cell.model_fingerprint, cell.precision)

        def make() -> ZeroShot:
            copy = self._fast_models.get_or_make(
                model, lambda: fast_copy(attacked.clip, cell.precision, compiled=compiled)
            )
            return attacked.with_clip(copy.with_resize(cell.protocol.resize))

        return self._fast_victims.get_or_make((*model, *_classifier_key(cell, cell.attacked)), make)

    def _adversarial_prompts(self, cell: Cell, victim: ZeroShot) -> tuple[str, ...] | None:
        """Return the adversarial prompts, from memory or the store; else make and store them.

        They are made once per (model, class set, settings). None for an attack that prepares none.
        """
        if cell.attack.describe_prepared() is None:
            return None
        name = f"texts/{cell.texts_id}.json"

        def make() -> tuple[str, ...]:
            owners = [name for i, name in enumerate(cell.class_names) for _ in victim.prompts_of(i)]
            return prepare_texts(cell.attack, victim, self.store, name, owners)

        return self._prompts.get_or_make(cell.texts_id, make)


def _classifier_key(cell: Cell, scorer: Scorer) -> tuple[str, ...]:
    return cell.protocol.template, cell.protocol.resize, scorer.describe(), *cell.class_names


class _Reader:
    """Reads batches of images, the next one in a thread while this one is attacked."""

    def __init__(self, data: ImageSet, resolution: Resolution, image_size: int, *, pin: bool) -> None:
        self._data, self._resolution, self._size, self._pin = data, resolution, image_size, pin
        self._thread = ThreadPoolExecutor(1)
        self._coming: tuple[Sequence[int], Future[Tensor]] | None = None

    def __call__(self, positions: Sequence[int], *, then: Sequence[int]) -> Tensor:
        """Return the pixels (uint8) of these images, and begin to read those that are likely to be wanted next."""
        if self._coming is None or self._coming[0] != positions:  # the first, or memory was short and batches shrank
            self._coming = positions, self._thread.submit(self._read, positions)
        _, found = self._coming
        self._coming = (then, self._thread.submit(self._read, then)) if then else None
        return found.result()

    def _read(self, positions: Sequence[int]) -> Tensor:
        pixels = batch_pixels(self._data, positions, self._resolution, self._size)
        return pixels.pin_memory() if self._pin else pixels


def _out_of_memory(error: BaseException) -> bool:
    """Return whether GPU or host memory ran out: torch has a class for the former and only a message for the latter."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _free_memory(compiled: bool) -> None:
    if compiled:
        torch.compiler.reset()  # CUDA graphs keep the memory of every batch size that they ran
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

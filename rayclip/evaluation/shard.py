"""Evaluate one shard: run the attack on the model and turn the results into verdicts. No other module does this.

Shapes: B batch, K classes.
"""

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayclip.attacks import Samples
from rayclip.attacks.geometry import margin
from rayclip.data import ImageSet, open_data
from rayclip.defenses import IGNORE, Defended, describe_chain
from rayclip.evaluation.batching import BatchSizes, CudaMemory, Memory
from rayclip.evaluation.cell import Cell
from rayclip.evaluation.confirm import Confirmed, run_confirmed
from rayclip.evaluation.costs import Hardware, timing
from rayclip.evaluation.examples import keep_examples, prepare_texts
from rayclip.evaluation.plan import Shard
from rayclip.evaluation.reading import Reader, Reading
from rayclip.evaluation.reuse import Reuse, reuse_key
from rayclip.evaluation.saving import SAVED_COLUMNS, saved_columns, write_part
from rayclip.evaluation.schedule import KEPT
from rayclip.models import Clip, ZeroShot, fast_copy, load_model
from rayclip.models.exact import use_exact_fp32
from rayclip.models.scorers import Scorer
from rayclip.models.zeroshot import find_faults
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
    """The outcome of a shard: samples that are right before and after the attack, seconds of loading and running, and
    of these what reading took."""

    right: int
    samples: int
    loading: float
    seconds: float
    reading: Reading


class Evaluator:
    """Evaluator of shards: writes their result files and keeps models, class embeddings and data sets loaded.

    Args:
        device: where models run; they judge in fp32 with TF32 off.
        batch_size: images per forward, halved for a model and attack if memory is short; None finds it on a GPU
            (`batching`).
        compiled: whether to attack a compiled copy of the model (`models.fast`).
        hardware: to record in the results; None is this process's.
        threads: that decode images.
        memory: in which batches run; None is the GPU's, if there is one.
        given: models in memory by specification, on this device, which are not loaded.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        *,
        compiled: bool = False,
        hardware: Hardware | None = None,
        threads: int = 1,
        memory: Memory | None = None,
        given: Mapping[str, Clip] = MappingProxyType({}),
    ) -> None:
        self.store, self.device, self._compiled, self._threads = store, torch.device(device), compiled, threads
        self.hardware, self._given = hardware or Hardware.here(self.device), given
        if memory is None and self.device.type == "cuda":
            memory = CudaMemory(self.device, self.hardware.gpus)
        self._sizes = BatchSizes(batch_size, memory)
        use_exact_fp32()
        self._models, self._fast_models = Cache[str, Clip](), Cache[tuple[str, str], Clip]()
        self._victims, self._fast_victims = Cache[tuple[str, ...], ZeroShot](), Cache[tuple[str, ...], ZeroShot]()
        self._data, self._prompts = Cache[str, ImageSet](), Cache[str, tuple[str, ...]]()
        self._reuse = Reuse()
        self._readers = Cache[tuple[str, str, int], Reader]()

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
        parts, start, kind, each = [], 0, _kind_of_work(cell), cell.images_at_once
        read = self._reader(cell, data, victim.clip.image_size)
        while start < len(positions):
            images = min(self._sizes.begin(kind), batch_size or each * len(positions))
            size = max(1, images // each)
            now = positions[start : start + size]
            try:
                pixels = read(now, then=positions[start + size : start + 2 * size])
                save = shard.writes != "verdicts"
                parts.append(self._batch(cell, data, victim, prompts, now, pixels, keep=keep, save=save))
                start += size
                self._sizes.fitted(kind, images if len(now) == size else each * len(now))
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
            self._sizes.halve(kind, min(images, each * len(now)))
            self._reuse.clear()
            _free_memory(self._compiled)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        right = (columns["clean_pred"] == columns["label"]) & (columns["adv_pred"] == columns["label"])
        done = Done(int(right.sum()), len(positions), loaded - began, time.perf_counter() - loaded, read.take())
        saved = {name: columns.pop(name) for name in SAVED_COLUMNS if name in columns}
        if keep and saved:  # first, so that no verdict of this run lacks its image
            write_part(self.store, shard.images_name, columns | saved)
        if keep and shard.writes != "images":
            self.store.write_table(shard.name, columns, timing(done.seconds, self.hardware, done.reading))
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
        save: bool = False,
    ) -> dict[str, np.ndarray]:
        ids = data.ids[list(positions)]
        labels = torch.from_numpy(data.labels[list(positions)]).to(self.device)
        images = pixels.to(self.device, non_blocking=True).float() / 255
        # A sample's noise depends on the attack's kind, not on its other settings: with the same start for every eps
        # and number of steps, curves over them are smooth.
        keys = sample_keys(ids.tolist(), cell.protocol.seed, cell.data_fingerprint, cell.attack.name)
        judge, target, fast = self._classifiers(cell, victim, ids)
        with torch.no_grad():
            image_BD = judge.embed(images)
            clean_logits = judge.logits(image_BD)
        samples = Samples(images, labels, keys, todo_B=clean_logits.argmax(1) == labels)

        def attack(samples: Samples) -> Confirmed:
            if fast is None:
                return Confirmed(cell.attack.run(target, samples, eps=cell.eps or 0.0, prompts=prompts), None)
            return run_confirmed(cell.attack, target, fast, samples, eps=cell.eps or 0.0, prompts=prompts)

        key = reuse_key(cell, tuple(positions))
        if key is None:
            result, logits = attack(samples)
            adv_logits = logits if target is judge else None
        else:
            result, adv_logits = self._reuse.run(key, samples, lambda samples: attack(samples).found), None
        if adv_logits is None:
            known_BD = image_BD if result.images_BCHW is images else None  # an attack on texts alone
            with torch.no_grad():
                adv_logits = result.logits(judge, labels, known_BD)
        if cell.judgements > 1:
            with torch.no_grad():
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
        if save:
            verdicts |= saved_columns(
                result.images_BCHW,
                images,
                lambda rounded: result._replace(images_BCHW=rounded).logits(judge, labels).argmax(1),
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
            return target if ignored else Defended(target, cell.aim.source or cell.defense, drawn, cell.aim)

        fast = self._fast(cell, attacked)
        judge = Defended(judge, cell.defense, drawn) if cell.defense else judge
        return judge, aimed(attacked), None if fast is None else aimed(fast)

    @staticmethod
    def _check_logits(cell: Cell, ids: np.ndarray, *logits_BK: Tensor) -> None:
        """Raise if logits are no prediction."""
        for what, bad_B in find_faults(*logits_BK):
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

    def _reader(self, cell: Cell, data: ImageSet, image_size: int) -> Reader:
        def make() -> Reader:
            pin = self.device.type == "cuda"
            return Reader(data, cell.protocol.resolution, image_size, threads=self._threads, pin=pin)

        reader = self._readers.get_or_make((cell.data_fingerprint, cell.protocol.resolution, image_size), make)
        reader.take()
        return reader

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


def _kind_of_work(cell: Cell) -> tuple[str, ...]:
    """Return what decides on the memory that an image takes."""
    seen = cell.scorer.describe(), cell.attacked.describe(), describe_chain(cell.defense), str(cell.aim.describe())
    return cell.model_fingerprint, cell.attack.name, cell.precision, cell.protocol.resolution, *seen


def _classifier_key(cell: Cell, scorer: Scorer) -> tuple[str, ...]:
    return cell.protocol.template, cell.protocol.resize, scorer.describe(), *cell.class_names


def _out_of_memory(error: BaseException) -> bool:
    """Return whether GPU or host memory ran out: torch has a class for the former and only a message for the latter."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _free_memory(compiled: bool) -> None:
    if compiled:
        torch.compiler.reset()  # CUDA graphs keep the memory of every batch size that they ran
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Write captions on Ray actors: classes are sent in chunks, and each finished chunk is kept beside the result."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from rayclip.data import ImageSet
from rayclip.distributed.pool import Pool, start_actor, use_device
from rayclip.distributed.resources import within_reach
from rayclip.evaluation.schedule import Queue, Schedule, ShardId
from rayclip.models.generators import GeneratorSettings, TransformersGenerator, caption_classes
from rayclip.progress import Display
from rayclip.store import Store
from rayclip.types import UserError

_CHUNK_S = 3600.0  # more than any chunk takes: a worker that hangs for longer is late


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """A captioning job. Every field can change the captions, so a folder of parts belongs to one job."""

    generator: str  # folder or hub id
    generator_fingerprint: str  # of `generator_kind`
    class_names: tuple[str, ...]  # without duplicates
    per_class: int  # captions per class
    questions: tuple[str, ...]  # prompts to the generator, with {} for the class
    images: int = 0  # example images per class; 0 asks by the name alone
    data_fingerprint: str = ""  # of the data set that the images come from
    seed: int = 0  # of sampling and of the choice of images
    settings: GeneratorSettings = field(default_factory=GeneratorSettings)

    def chunks(self) -> list[tuple[str, ...]]:
        """Return the classes in chunks that each fill a batch."""
        size = max(1, self.settings.batch_size // self.per_class)
        return [self.class_names[i : i + size] for i in range(0, len(self.class_names), size)]


def open_parts(job: CaptionJob, folder: Path) -> None:
    """Make a job's folder of parts. Raise a `UserError` if it exists and belongs to another job."""
    described, parts = json.loads(json.dumps(asdict(job))), Store(str(folder))
    before = parts.read_json("job.json", dict)
    if before is None:
        parts.write_json("job.json", described)
        return
    changed = [name for name in described if before.get(name) != described[name]]
    if changed:
        raise UserError(
            f"{folder} was begun with another {', '.join(changed)}: use the same again, delete that folder, or give "
            "another --out."
        )


def generate_captions(
    job: CaptionJob, folder: Path, data: ImageSet | None, *, display: Display, workers: int | None = None
) -> dict[str, list[str]]:
    """Write the captions that the folder of parts (of `open_parts`) does not hold yet; return all by class.

    Only the driver writes there. Raises a `UserError` as `Pool.run` does.

    Args:
        data: source of the example images; needed if `job.images` is not 0.
        workers: number of actors; None is one per GPU, or one per node without GPUs.
    """
    count, parts = len(job.chunks()), Store(str(folder))
    todo = [number for number in range(count) if parts.size(_part(number)) is None]
    if todo:
        _CaptionPool(job, todo, parts, data, display, workers).run()
    captions: dict[str, list[str]] = {}
    for number in range(count):
        captions |= parts.read_json(_part(number), dict)
    return captions


def example_positions(data: ImageSet, class_name: str, count: int, seed: int) -> list[int]:
    """Return up to `count` positions of a class's images; the choice depends only on (seed, class)."""
    label = data.class_names.index(class_name)
    members = np.flatnonzero(data.labels == label)
    order = np.random.Generator(np.random.Philox(key=[seed, label])).permutation(len(members))
    return [int(p) for p in members[order[:count]]]


class _CaptionPool(Pool):
    """A shard is a chunk of classes; only the driver writes, and reads images, so that only it needs their files."""

    task = "writing captions"
    last_resort = "with no other beside it"

    def __init__(
        self,
        job: CaptionJob,
        todo: list[int],
        parts: Store,
        data: ImageSet | None,
        display: Display,
        workers: int | None,
    ) -> None:
        self._job, self._chunks, self._todo, self._parts, self._data = job, job.chunks(), todo, parts, data
        self._count, self._cpus, self._gpus = _resources(workers)
        classes, left = len(job.class_names), sum(len(self._chunks[number]) for number in todo)
        needs = f"{self._gpus:g} GPU" if self._gpus else f"{self._cpus:g} CPUs"
        super().__init__(display, shards=len(todo), needs=needs, done=classes - left, total=classes)
        self.schedule = Schedule([Queue(samples=len(todo), size=1, needs=(), seconds=_CHUNK_S)])

    def count_wanted(self) -> int:
        return self._count

    def make_actor(self) -> tuple[Any, Any]:
        actor = start_actor(_Actor, self._cpus, self._gpus, self._job, self._cpus)
        return actor, actor.hello.remote()

    def call(self, actor: Any, shard: ShardId, batch_size: int) -> Any:
        number, job, data = self._todo[shard.number], self._job, self._data
        names, images = self._chunks[number], []
        if job.images and data is not None:
            images = [data.images(example_positions(data, name, job.images, job.seed)) for name in names]
        return actor.run.remote(number, names, images)

    def take(self, shard: ShardId | None, answer: list[list[str]]) -> None:
        if shard is None:
            return
        number = self._todo[shard.number]
        chunk = self._chunks[number]
        self._parts.write_json(_part(number), dict(zip(chunk, answer, strict=True)))
        self.done += len(chunk)
        self.show(chunk[-1])

    def name(self, shard: ShardId) -> str:
        return f"the chunk of captions that begins with '{self._chunks[self._todo[shard.number]][0]}'"


class _Actor:
    """A worker with one generator, loaded in `hello`: an error in the constructor would look like a lost actor."""

    def __init__(self, job: CaptionJob, cpus: float) -> None:
        self._job, self._cpus = job, cpus

    def hello(self) -> tuple[str, None]:
        """Load the generator; return the address of this actor's node."""
        self._generator = TransformersGenerator(self._job.generator, use_device(self._cpus), self._job.settings)
        return ray.util.get_node_ip_address(), None

    def run(self, number: int, names: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[list[str]]:
        job = self._job
        seed = job.seed * 1_000_003 + number  # depends on the chunk, not on the actor or the order
        try:
            return caption_classes(
                self._generator, names, job.per_class, questions=job.questions, images=images, seed=seed
            )
        except torch.OutOfMemoryError as error:
            raise UserError("the generator ran out of GPU memory: try a smaller --batch-size.") from error


def _resources(workers: int | None) -> tuple[int, float, float]:
    """Return (actors, CPUs per actor, GPUs per actor), no more than fit in the cluster: others would wait for ever.

    On CPUs, a language model needs all cores of a node, and its memory.
    """
    gpus = int(within_reach()["GPU"])
    if gpus:
        return min(workers or gpus, gpus), 1.0, 1.0
    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    cpus = [count for count in cpus if count >= 1] or [1.0]
    count = min(workers or len(cpus), len(cpus) * int(min(cpus)))
    return count, max(1.0, min(cpus) // math.ceil(count / len(cpus))), 0.0


def _part(number: int) -> str:
    return f"part-{number:05d}.json"

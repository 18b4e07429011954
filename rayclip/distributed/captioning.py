"""Write captions on Ray actors: classes are sent in chunks, and each finished chunk is kept beside the result."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from PIL import Image
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from rayclip.data import ImageSet
from rayclip.distributed.faults import AGAIN, explain, only_node, out_of_memory
from rayclip.distributed.resources import within_reach
from rayclip.models.generators import GeneratorSettings, TransformersGenerator, caption_classes
from rayclip.progress import Display
from rayclip.store import Store
from rayclip.types import UserError

_ATTEMPTS = 3  # attempts at a chunk whose actor was lost


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """A captioning job. Every field can change the captions, so a folder of parts belongs to one job.

    Attributes:
        generator: folder or hub id.
        generator_fingerprint: `generator_kind(generator).fingerprint`.
        class_names: class names without duplicates.
        per_class: captions per class.
        questions: prompts to the generator, with `{}` for the class.
        images: example images per class; 0 asks by the name alone.
        data_fingerprint: fingerprint of the data set that the images come from; "" without images.
        seed: seed of sampling and of the choice of images.
        settings: settings of the generator. They include the batch size because a batch is sampled together.
    """

    generator: str
    generator_fingerprint: str
    class_names: tuple[str, ...]
    per_class: int
    questions: tuple[str, ...]
    images: int = 0
    data_fingerprint: str = ""
    seed: int = 0
    settings: GeneratorSettings = field(default_factory=GeneratorSettings)

    def chunks(self) -> list[tuple[str, ...]]:
        """Return the classes in chunks that each fill a batch."""
        size = max(1, self.settings.batch_size // self.per_class)
        return [self.class_names[i : i + size] for i in range(0, len(self.class_names), size)]


def open_parts(job: CaptionJob, folder: Path) -> None:
    """Make a job's folder of parts; if it exists, check that it belongs to this job.

    Raises:
        UserError: it belongs to another job.
    """
    described, parts = json.loads(json.dumps(asdict(job))), Store(str(folder))
    before = parts.read_json("job.json")
    if before is not None:
        changed = [name for name in described if before.get(name) != described[name]]
        if changed:
            raise UserError(
                f"{folder} was begun with another {', '.join(changed)}: use the same again, delete that folder, or "
                "give another --out."
            )
    else:
        parts.write_json("job.json", described)


def generate_captions(
    job: CaptionJob, folder: Path, data: ImageSet | None, *, display: Display, workers: int | None = None
) -> dict[str, list[str]]:
    """Write the captions that the folder of parts does not hold yet; return all captions by class.

    Args:
        folder: folder of parts, made by `open_parts`; only the driver writes there.
        data: source of the example images; needed if `job.images` is not 0.
        workers: number of actors; None is one per GPU, or one per node without GPUs.

    Raises:
        UserError: an actor raised it; or a chunk's actor was lost `_ATTEMPTS` times.
    """
    chunks, parts = job.chunks(), Store(str(folder))
    todo = [number for number in range(len(chunks)) if parts.size(_part(number)) is None]
    if todo:
        _Pool(job, chunks, todo, parts, data, display).run(workers)
    captions: dict[str, list[str]] = {}
    for number in range(len(chunks)):
        captions |= parts.read_json(_part(number))
    return captions


def example_positions(data: ImageSet, class_name: str, count: int, seed: int) -> list[int]:
    """Return up to `count` positions of a class's images; the choice depends only on (seed, class)."""
    label = data.class_names.index(class_name)
    members = np.flatnonzero(data.labels == label)
    order = np.random.Generator(np.random.Philox(key=[seed, label])).permutation(len(members))
    return [int(p) for p in members[order[:count]]]


class _Pool:
    def __init__(
        self,
        job: CaptionJob,
        chunks: Sequence[tuple[str, ...]],
        todo: Sequence[int],
        parts: Store,
        data: ImageSet | None,
        display: Display,
    ) -> None:
        self._job, self._chunks, self._queue = job, chunks, list(todo)
        self._parts, self._data, self._display = parts, data, display
        self._done = len(job.class_names) - sum(len(chunks[number]) for number in todo)
        self._attempts: dict[int, int] = {}
        self._places: dict[Any, Any] = {}  # the node addresses of actors, as futures
        self._alone = 0  # actors in a row that ran out of memory while no other was running

    def run(self, workers: int | None) -> None:
        count, cpus, gpus = _resources(workers)
        actor_class = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
        running: dict[Any, tuple[Any, int]] = {}

        def start(actor: Any | None = None) -> None:
            if not self._queue:
                return
            if actor is None:
                actor = actor_class.remote(self._job, max(1, int(cpus)))
                self._places[actor] = actor.where.remote()
            number = self._queue.pop(0)
            running[actor.run.remote(number, self._chunks[number], self._images(number))] = actor, number

        try:
            for _ in range(min(count, len(self._queue))):
                start()
            while running:
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                actor, number = running.pop(ready)
                match self._collect(ready, number):
                    case "done":
                        self._alone = 0
                        start(actor)
                    case "lost":
                        start()
                    case "pressed" if not running:  # otherwise continue with one actor fewer
                        self._rest(actor)
                        start()
        finally:
            for actor in self._places:
                ray.kill(actor)

    def _rest(self, actor: Any) -> None:
        """Wait for memory; raise a `UserError` after `_ATTEMPTS` attempts with a single actor."""
        self._alone += 1
        if self._alone >= _ATTEMPTS:
            try:
                node = ray.get(self._places[actor], timeout=1)
            except (RayError, GetTimeoutError):
                node = only_node()
            raise out_of_memory(node, f" {self._alone} times with no other beside it")
        time.sleep(2.0**self._alone)

    def _images(self, number: int) -> list[list[Image.Image]]:
        """Return a chunk's example images; the driver reads them, so that only it needs the data set's files."""
        if not self._job.images or self._data is None:
            return []
        job, data = self._job, self._data
        return [data.images(example_positions(data, name, job.images, job.seed)) for name in self._chunks[number]]

    def _collect(self, ready: Any, number: int) -> Literal["done", "lost", "pressed"]:
        """Write a finished chunk, or put the chunk of a lost actor back into the queue.

        Returns "pressed" if Ray's memory monitor killed the actor, "lost" if it was lost otherwise.
        """
        chunk = self._chunks[number]
        try:
            captions = ray.get(ready)
        except RayTaskError as error:
            if isinstance(error.cause, torch.OutOfMemoryError):
                raise UserError("the generator ran out of GPU memory: try a smaller --batch-size.") from None
            raise explain(error) from None
        except OutOfMemoryError:
            self._queue.insert(0, number)
            return "pressed"
        except RayError as error:
            self._attempts[number] = self._attempts.get(number, 0) + 1
            if self._attempts[number] >= _ATTEMPTS:
                raise UserError(
                    f"the captions of '{chunk[0]}' lost their worker {_ATTEMPTS} times (out of memory? try a smaller "
                    f"--batch-size or generator); {AGAIN}."
                ) from error
            self._queue.insert(0, number)
            return "lost"
        self._parts.write_json(_part(number), dict(zip(chunk, captions, strict=True)))
        self._done += len(chunk)
        self._display.update("writing captions", self._done, len(self._job.class_names), chunk[-1])
        return "done"


class _Actor:
    """A worker with one generator.

    The generator is loaded with the first chunk: an error in the constructor would look like a lost actor.
    """

    def __init__(self, job: CaptionJob, threads: int) -> None:
        self._job, self._threads = job, threads
        self._generator: TransformersGenerator | None = None

    def where(self) -> str:
        """Return the address of this actor's node."""
        return ray.util.get_node_ip_address()

    def run(self, number: int, names: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[list[str]]:
        job = self._job
        if self._generator is None:
            device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
            if device == "cpu":
                torch.set_num_threads(self._threads)
            self._generator = TransformersGenerator(job.generator, device, job.settings)
        return caption_classes(
            self._generator,
            names,
            job.per_class,
            questions=job.questions,
            images=images,
            seed=job.seed * 1_000_003 + number,  # depends on the chunk, not on the actor or the order
        )


def _resources(workers: int | None) -> tuple[int, float, float]:
    """Return (actors, CPUs per actor, GPUs per actor), no more than fit in the cluster: others would wait for ever.

    On CPUs, a language model needs all cores of a node, and its memory.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = within_reach()["GPU"]
    if gpus >= 1:
        return min(workers or int(gpus), int(gpus)), 1.0, 1.0
    smallest = min((node["CPU"] for node in nodes), default=1.0)
    count = min(workers or max(1, len(nodes)), max(1, len(nodes)) * int(smallest))
    return count, max(1.0, smallest // -(-count // max(1, len(nodes)))), 0.0


def _part(number: int) -> str:
    return f"part-{number:05d}.json"

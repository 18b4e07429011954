"""Estimate the seconds that a sample takes: from measurements of its cell if there are any, else of similar cells."""

import json
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from rayclip.evaluation.cell import Cell
from rayclip.evaluation.reading import NOT_READ, Reading
from rayclip.store import Store

Basis = Literal["measured", "same kind", "same model", "forwards"]

_FILES = 4  # result files per cell that an estimate reads


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware of one worker. Two workers that share a GPU have 0.5 each."""

    name: str  # of the GPU, or `cpu`
    gpus: float  # share of a GPU, or number of GPUs; 0 on CPUs
    cores: int  # compute threads

    @classmethod
    def here(cls, device: torch.device, gpus: float | None = None) -> "Hardware":
        """Return this process's hardware on `device`; `gpus` is its share of a GPU, by default all of it."""
        if device.type == "cuda":
            return cls(name=torch.cuda.get_device_name(device), gpus=gpus or 1.0, cores=1)
        return cls(name="cpu", gpus=0.0, cores=torch.get_num_threads())

    @property
    def units(self) -> float:
        """Return the number of GPUs, or of cores on CPUs; the price of an hour is per unit."""
        return self.gpus or float(self.cores)

    @property
    def unit(self) -> str:
        return "GPU" if self.gpus else "core"

    def __str__(self) -> str:
        share = "" if self.gpus in (0.0, 1.0) else f"{self.gpus:g} of "
        return f"{share}{self.name}" if self.gpus else f"cpu, {self.cores} thread{'s' if self.cores > 1 else ''}"


def peak_memory() -> float:
    """Return the most bytes of memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@dataclass(frozen=True, kw_only=True)
class PoolStatistics:
    """The resources and times of an evaluation; times in seconds."""

    hardware: Hardware  # of its first worker
    workers: int  # maximum number of workers busy at once
    wall: float  # from submission to the last shard's end
    waited: float  # from submission to the first shard's start
    busy: float  # of all workers on shards, without loading
    loading: float  # of all workers: models, class embeddings and data
    copies: int  # second copies started because a shard was late
    lost: int  # shards that were started again because their worker failed


def timing(seconds: float, hardware: Hardware, reading: Reading) -> dict[str, Any]:
    """Return the metadata on timing that a result file carries beside its rows (see `read_timings`)."""
    return {"seconds": round(seconds, 6), "hardware": asdict(hardware), "reading": reading._asdict()}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A measurement: `samples` took one worker `seconds` on `hardware`, with `reading` among it."""

    samples: int
    seconds: float
    hardware: Hardware
    reading: Reading = NOT_READ


def read_timings(cell: str, store: Store, files: int | None = _FILES) -> list[Timing]:
    """Return the timings of up to `files` result files of the cell with this id; files of early versions have none."""
    found = []
    for name in store.names(f"cells/{cell}", ".parquet")[:files]:
        samples, note = store.read_note(name)
        if "seconds" in note:
            reading = Reading(**note["reading"]) if "reading" in note else NOT_READ
            hardware = Hardware(**note["hardware"])
            found.append(Timing(samples=samples, seconds=note["seconds"], hardware=hardware, reading=reading))
    return found


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Speed of decoding a cell's images, and the threads that it takes.

    Attributes:
        rate: images per second that one thread decodes.
        threads: of a worker.
        needed: threads that decode images as fast as the attack takes them.
    """

    rate: float
    threads: int
    needed: float

    @property
    def bounds(self) -> bool:
        """Return whether the attack waits for images."""
        return self.needed > self.threads


class Costs:
    """Estimates of the seconds that one sample of a cell takes.

    For a cell that was not measured: the mean of its kind (same model, attack, protocol) on other data; else its
    forwards times the seconds per forward of the same model, or of all models. Without any measurement, the number of
    forwards stands for seconds.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Basis, str], tuple[float, float]] = {}  # samples or forwards, and their seconds
        self._kinds: dict[str, str] = {}
        self._decoding: dict[str, Decoding] = {}

    def add(self, cell: Cell, samples: int, seconds: float, reading: Reading = NOT_READ) -> None:
        """Add one measurement."""
        if reading.decoding and seconds > reading.waiting:
            needed = reading.decoding / (seconds - reading.waiting)
            self._decoding[cell.id] = Decoding(rate=samples / reading.decoding, threads=reading.threads, needed=needed)
        for key, each in self._bases(cell):
            amount, total = self._sums.get(key, (0.0, 0.0))
            self._sums[key] = amount + samples * each, total + seconds

    def read(self, cells: Iterable[Cell], store: Store, hardware: Hardware | None) -> None:
        """Add the timings of earlier results on this hardware."""
        for cell in cells:
            for found in read_timings(cell.id, store):
                if found.hardware == hardware:
                    self.add(cell, found.samples, found.seconds, found.reading)

    @property
    def measured(self) -> bool:
        """Return whether there is any measurement, so that `seconds` are real seconds."""
        return bool(self._sums)

    def seconds(self, cell: Cell) -> float:
        return self._estimate(cell)[0]

    def decoding(self, cell: Cell) -> Decoding | None:
        """Return what decoding takes as last measured; None if it was not."""
        return self._decoding.get(cell.id)

    def basis(self, cell: Cell) -> Basis:
        """Return what the estimate of `seconds` is based on."""
        return self._estimate(cell)[1]

    def _bases(self, cell: Cell) -> list[tuple[tuple[Basis, str], int]]:
        """Return the sums that a cell counts in, the closest first, and how much one of its samples adds to each."""
        if cell.id not in self._kinds:
            self._kinds[cell.id] = json.dumps([cell.model_fingerprint, cell.describe()], sort_keys=True)
        return [
            (("measured", cell.id), 1),
            (("same kind", self._kinds[cell.id]), 1),
            (("same model", cell.model_fingerprint), cell.cost),
            (("forwards", ""), cell.cost),
        ]

    def _estimate(self, cell: Cell) -> tuple[float, Basis]:
        for key, each in self._bases(cell):
            if key in self._sums:
                amount, seconds = self._sums[key]
                return each * seconds / amount, key[0]
        return cell.cost, "forwards"

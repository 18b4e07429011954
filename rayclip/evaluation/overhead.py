"""The cost of judging an image behind a defence: time, computation and memory, measured on a few images."""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from rayclip.data import batch_pixels, open_data
from rayclip.defenses import Defended
from rayclip.evaluation.cell import Cell
from rayclip.evaluation.costs import Hardware
from rayclip.evaluation.plan import chosen_positions
from rayclip.models import ZeroShot, load_model
from rayclip.rng import sample_keys
from rayclip.store import Store

_IMAGES, _RUNS = 32, 3


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Cost of judging one image.

    Attributes:
        milliseconds: median of three runs.
        forwards: floating-point operations, in forwards of the undefended model.
        mebibytes: most memory at a time beyond the model's.
        images: judged at a time.
    """

    milliseconds: float
    forwards: float
    mebibytes: float
    images: int
    hardware: str


def measure_overhead(cell: Cell, device: torch.device | str = "cpu") -> Overhead:
    """Judge some of a cell's images as they are."""
    data, clip = open_data(cell.data, "test"), load_model(cell.model, device).with_resize(cell.protocol.resize)
    victim = cell.scorer.classifier(clip, cell.class_names, cell.protocol.template)
    positions = chosen_positions(len(data), _IMAGES).tolist()
    pixels = batch_pixels(data, positions, cell.protocol.resolution, clip.image_size).to(device).float() / 255
    keys = sample_keys(data.ids[positions].tolist(), cell.protocol.seed, cell.data_fingerprint, "defense")

    def classifier() -> ZeroShot:
        bound = cell.scorer.bind(victim, keys, attacked=False)
        return Defended(bound, cell.defense, keys) if cell.defense else bound

    def judge() -> None:
        with torch.no_grad():
            classifier()(pixels)

    seconds = [_timed(judge, pixels.device) for _ in range(_RUNS + 1)][1:]
    count, bare = len(pixels), _profiled(lambda: victim(pixels), pixels.device)
    found = _profiled(judge, pixels.device)
    return Overhead(
        milliseconds=1000 * statistics.median(seconds) / count,
        forwards=found.operations / bare.operations,
        mebibytes=found.peak / count / 2**20,
        images=count,
        hardware=str(Hardware.here(pixels.device)),
    )


def keep_overhead(cell: Cell, store: Store, device: torch.device | str = "cpu") -> None:
    """Measure a cell's overhead and write it beside its verdicts, unless it is there."""
    if store.size(_name(cell.id)) is None:
        store.write_json(_name(cell.id), asdict(measure_overhead(cell, device)))


def read_overhead(cell: str, store: Store) -> Overhead | None:
    """Return the overhead that was measured of the cell with this id."""
    found = store.read_json(_name(cell))
    return None if found is None else Overhead(**found)


def _name(cell: str) -> str:
    return f"cells/{cell}/overhead.json"


def _timed(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what libraries write to the error stream, as the profiler does whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Profile(NamedTuple):
    """Floating-point operations of a run, of matrix products and convolutions, and the most bytes held at a time."""

    operations: int
    peak: int


def _profiled(run: Callable[[], object], device: torch.device) -> _Profile:
    """Profile a run. On CPUs, memory is added up from one operation to the next."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with (
        torch.no_grad(),
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=not on_gpu, with_flops=True) as profiler,
    ):
        run()
    events = sorted(profiler.events() or (), key=lambda event: event.time_range.end)
    held = most = 0
    for event in events:
        held += event.self_cpu_memory_usage
        most = max(most, held)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else most
    return _Profile(sum(event.flops or 0 for event in events), peak)

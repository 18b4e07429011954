"""Training whose workers Ray's memory monitor ends: each further attempt takes its batches in twice as many parts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.train import ControllerError, UserCallback

from rayclip.distributed.faults import no_memory, often, only_node, ran_out_of_memory
from rayclip.distributed.notes import Notes
from rayclip.training import TrainConfig


class MemoryWatch(UserCallback):
    """Notes in the controller which worker was ended, for the workers that come after it."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            if ran_out_of_memory(error):
                note_pressure(self._notes, self._notes.node_of(rank))
                return


def note_pressure(notes: Notes, node: str | None = None) -> None:
    """Count what Ray's memory monitor has ended, for those that come after it."""
    notes.write("pressure", f"{_times(notes) + 1} {node or only_node() or ''}")


def fit_into_memory(config: TrainConfig, notes: Notes, rank: int, world_size: int) -> TrainConfig:
    """The configuration with as many parts of a batch as the attempts before suggest; the result is the same up to
    rounding. Called by each worker, which says where it is."""
    notes.write_node(rank, ray.util.get_node_ip_address())
    return replace(config, accumulate=_parts(config, _times(notes), world_size))


def lost_a_helper(error: BaseException) -> bool:
    """Whether Ray's memory monitor has ended what Train works with, and not a worker: Train itself does not try again,
    but Tune does, if its function raises."""
    return isinstance(error, ControllerError) and ran_out_of_memory(error)


def why_it_failed(error: BaseException | None, notes: Notes, config: TrainConfig, world_size: int) -> str | None:
    """A sentence if memory was the reason, None otherwise. What Tune hands on of a lost helper has lost its cause, but
    not what `drive` has noted of it."""
    if not ran_out_of_memory(error) and notes.read("starved") is None:
        return None
    times = _times(notes)
    parts = _parts(config, max(0, times - 1), world_size)
    tried = f" {often(times)}, at last with a batch in {parts} part{'s' * (parts > 1)}" if times else ""
    return str(no_memory((notes.read("pressure") or "").partition(" ")[2] or only_node(), tried))


def _times(notes: Notes) -> int:
    return int((notes.read("pressure") or "0").split()[0])


def _parts(config: TrainConfig, times: int, world_size: int) -> int:
    """Not more than a worker has images of a batch."""
    return max(config.accumulate, min(config.accumulate << times, config.recipe.batch_size // world_size))

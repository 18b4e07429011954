"""Say why training failed; retry it with smaller parts of a batch if memory was short, a node's or a GPU's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train import ControllerError, TrainingFailedError, UserCallback

from rayclip.distributed.faults import (
    filled_gpu,
    find_causes,
    first_line,
    only_node,
    out_of_memory,
    ran_out_of_memory,
    times_in_words,
)
from rayclip.distributed.trials import Notes
from rayclip.store import storage_failure
from rayclip.training import TrainConfig
from rayclip.types import UserError


class MemoryCallback(UserCallback):
    """A callback in Train's controller that records which worker had too little memory, for the next attempt."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            if ran_out_of_memory(error) or filled_gpu(error):
                note_pressure(self._notes, self._notes.read(f"node-{rank}"))
                return


def note_pressure(notes: Notes, node: str | None = None) -> None:
    """Count one more process that Ray's memory monitor killed, or whose GPU was full, for the next attempt."""
    notes.write("pressure", f"{_times(notes) + 1} {node or only_node() or ''}")


def fit_into_memory(config: TrainConfig, notes: Notes, rank: int, world_size: int) -> TrainConfig:
    """Return the configuration with batches in twice as many parts for every time, which changes results by rounding
    only. Every worker calls this; it also notes the worker's node."""
    notes.write(f"node-{rank}", ray.util.get_node_ip_address())
    return replace(config, accumulate=_parts(config, _times(notes), world_size))


def is_lost_controller(error: BaseException) -> bool:
    """Return whether Ray's memory monitor killed one of Train's own processes: then only Tune tries again, if its
    function raises."""
    return isinstance(error, ControllerError) and ran_out_of_memory(error)


def explain_failure(error: BaseException | None, notes: Notes, config: TrainConfig, world_size: int) -> str:
    """Return one sentence on why training failed.

    Tune's error lacks the cause if one of Train's own processes was killed; the trial's Tune function has left a note
    then.
    """
    on_gpu = filled_gpu(error)
    if not ran_out_of_memory(error) and not on_gpu and notes.read("starved") is None:
        return _reason(error)
    times = _times(notes)
    parts = _parts(config, max(0, times - 1), world_size)
    tried = f" {times_in_words(times)}, at last with a batch in {parts} part{'s' * (parts > 1)}" if times else ""
    node = (notes.read("pressure") or "").partition(" ")[2] or only_node()
    return str(out_of_memory(node, tried, on_gpu=on_gpu))


def _reason(error: BaseException | None) -> str:
    """Return the cause that the user can fix if there is one, else the innermost."""
    causes = [c for c in find_causes(error) if not isinstance(c, RayTaskError | TrainingFailedError)]
    for cause in causes:
        if isinstance(cause, UserError | FloatingPointError):
            return str(cause)
    failure = next(filter(None, map(storage_failure, causes)), None)
    return str(failure) if failure else first_line(causes[-1] if causes else error or RuntimeError("unknown"))


def _times(notes: Notes) -> int:
    return int((notes.read("pressure") or "0").split()[0])


def _parts(config: TrainConfig, times: int, world_size: int) -> int:
    """Return the parts of a batch after so many kills; at most the number of a worker's images per batch."""
    return max(config.accumulate, min(config.accumulate << times, config.recipe.batch_size // world_size))

"""Turn exceptions of Ray and of its workers into one sentence that tells the user what to do."""

from collections.abc import Iterator

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from rayclip.types import UserError

AGAIN = "run again to go on from here"
_CAUSES = ("cause", "controller_failure", "health_check_failure", "__cause__", "__context__")
_LONGEST = 160  # characters of a message per line asked for, and at most twice that


def explain(error: Exception, node: str | None = None) -> Exception:
    """Return the exception to raise instead of Ray's: a `UserError` of one sentence; a bug unchanged.

    `node` is the address of the node that the error came from, if known.
    """
    for cause in find_causes(error):
        if isinstance(cause, RayTaskError):  # which is of its cause's class, too, and says where that was raised
            continue
        if isinstance(cause, UserError | FloatingPointError):
            return UserError(str(cause))
        if isinstance(cause, OutOfMemoryError):
            return out_of_memory(node or only_node())
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return UserError(f"Ray has failed ({first_line(error)}): see that its nodes are up, and {AGAIN}.")
    return error


def out_of_memory(node: str | None, tried: str = "", *, on_gpu: bool = False) -> UserError:
    """Return the error for workers that Ray's memory monitor killed, or whose GPU's memory was full; `tried` says what
    was tried before."""
    which = f"node {node}" if node else "a node"
    if on_gpu:
        return UserError(
            f"a GPU of {which} has too little memory: CUDA ran out of it{tried}; take smaller batches, a smaller model "
            f"or a larger GPU, and {AGAIN}."
        )
    return UserError(
        f"{which} has too little memory: Ray has ended {'a worker' if not tried else 'its workers'} there to keep it "
        f"alive{tried}; free memory on it, take smaller batches or a smaller model, or a larger node, and {AGAIN}."
    )


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether Ray's memory monitor caused the error."""
    return any(isinstance(cause, OutOfMemoryError) for cause in find_causes(error))


def filled_gpu(error: BaseException | None) -> bool:
    """Return whether the error is that a GPU's memory was full."""
    return any(isinstance(cause, torch.OutOfMemoryError) for cause in find_causes(error))


def times_in_words(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def only_node() -> str | None:
    """Return the address of the only node that runs workers; None if there are several."""
    if not ray.is_initialized():
        return None
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return alive[0] if len(alive) == 1 else None


def dead_nodes() -> set[str]:
    """Return the ids of the nodes that the cluster has lost."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def find_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all its causes, outermost first, as Ray and Python nest them."""
    left, seen = [error], set[int]()
    while left:
        found = left.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        left += [getattr(found, name, None) for name in _CAUSES]
        failures = getattr(found, "worker_failures", None)
        left += list(failures.values()) if isinstance(failures, dict) else []


def first_line(error: BaseException, lines: int = 1) -> str:
    """Return the first lines of an error's message, shortened; its type's name if the message is empty."""
    said = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()][:lines]
    return " ".join(said)[: _LONGEST * min(lines, 2)] or type(error).__name__

"""Turn Ray's exceptions into one sentence that tells the user what to do."""

from collections.abc import Iterator

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from rayclip.types import UserError

AGAIN = "run again to go on from here"
_WITHIN = ("cause", "controller_failure", "health_check_failure", "__cause__", "__context__")


def explained(error: Exception, node: str | None = None) -> Exception:
    """Return the exception to raise instead of Ray's.

    An error that the user can fix becomes a `UserError` of one sentence; a bug is returned unchanged.

    Args:
        node: address of the node that the error came from, if known.
    """
    for inner in within(error):
        if isinstance(inner, RayTaskError):  # which is of its cause's class, too, and says where that was raised
            continue
        if isinstance(inner, UserError | FloatingPointError):
            return UserError(str(inner))
        if isinstance(inner, OutOfMemoryError):
            return no_memory(node or only_node())
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return UserError(f"Ray has failed ({first_line(error)}): see that its nodes are up, and {AGAIN}.")
    return error


def no_memory(node: str | None, tried: str = "") -> UserError:
    """Return the error for workers that Ray's memory monitor killed; `tried` says what was tried before."""
    which = f"node {node}" if node else "a node"
    return UserError(
        f"{which} has too little memory: Ray has ended {'a worker' if not tried else 'its workers'} there to keep it "
        f"alive{tried}; free memory on it, take smaller batches or a smaller model, or a larger node, and {AGAIN}."
    )


def often(times: int) -> str:
    return "once" if times == 1 else f"{times} times"


def only_node() -> str | None:
    """Return the address of the only node that runs workers; None if there are several."""
    if not ray.is_initialized():
        return None
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return alive[0] if len(alive) == 1 else None


def within(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all its causes, as Ray and Python nest them."""
    left, seen = [error], set[int]()
    while left:
        found = left.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        left += [getattr(found, name, None) for name in _WITHIN]
        failures = getattr(found, "worker_failures", None)
        left += list(failures.values()) if isinstance(failures, dict) else []


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether Ray's memory monitor caused the error."""
    return any(isinstance(inner, OutOfMemoryError) for inner in within(error))


def first_line(error: BaseException, lines: int = 1) -> str:
    """Return the first lines of an error's message, shortened; its type's name if the message is empty."""
    said = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()][:lines]
    return " ".join(said)[: 160 * min(lines, 2)] or type(error).__name__

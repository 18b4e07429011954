"""Ctrl-C, and SIGTERM, by which batch systems and Kubernetes announce that they will kill a command: both stop it
cleanly, and a second one ends it at once."""

import os
import signal
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
STOPPED = "stopped; the same command goes on from here."

_received: list[int] = []


def listen() -> None:
    """Let the first SIGINT or SIGTERM raise `KeyboardInterrupt` in the main thread, which calls this, and the second
    end the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    os.register_at_fork(after_in_child=_forget)  # a pool ends its processes by SIGTERM


def _forget() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code() -> int:
    """Of a command that was stopped, as a shell has it: 128 and the number of the signal that came first."""
    return 128 + _received[0] if _received else INTERRUPTED


def stop(number: int) -> None:
    """What the first signal does; for one that a library has taken for itself."""
    _received.append(number)
    raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> None:
    if not _received:
        stop(number)
    from rayclip.progress import say

    try:
        say("note", STOPPED)
    except RuntimeError:  # it came in the middle of printing
        pass
    finally:
        os._exit(exit_code())

"""Handle Ctrl-C and SIGTERM, which batch systems and Kubernetes send before they kill a command: the first signal stops
the command cleanly, a second one ends it at once."""

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
STOPPED = "stopped; the same command goes on from here."

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


def listen() -> None:
    """Install the handlers: the first SIGINT or SIGTERM raises `KeyboardInterrupt` in the main thread, the second ends
    the process at once. Call from the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _stop)
    os.register_at_fork(after_in_child=_forget)  # process pools end their processes by SIGTERM


def _forget() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code() -> int:
    """Return the exit code of a stopped command, by shell convention: 128 plus the number of the first signal."""
    return 128 + _received[0] if _received else INTERRUPTED


def interrupted() -> bool:
    """Return whether a signal has arrived."""
    return bool(_received)


def stop(number: int) -> None:
    """Do what the first signal does; for handlers of signals that a library has taken over."""
    _received.append(number)
    for each in _SIGNALS:  # The next one ends the process wherever it hangs: in C++, no handler of ours would be called
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> None:
    stop(number)

"""The link between a command and its terminal: standard output and standard error, and the signals that stop it.

Results are printed whatever the terminal can show: in any encoding, closed, or piped to a reader that is gone. Ctrl-C
and SIGTERM, which batch systems and Kubernetes send before they kill a command, stop it cleanly the first time and at
once the second time.
"""

import codecs
import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from rayclip.types import UserError

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_PIPE = 141  # exit code that a shell reports for a program ended by SIGPIPE

# Replacements for the special characters of our own output, for encodings that lack them
_INSTEAD = str.maketrans(
    {
        "–": "-", "—": "-", "−": "-", "─": "-", "━": "-", "╸": "-", "╺": "-", "…": "...", "·": ".", "×": "x", "÷": "/",
        "✓": "v", "✗": "x", "†": "+", "≥": ">=", "≤": "<=", "→": "->", "∞": "inf", "±": "+-", "°": " deg", "•": "*",
        "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip
_HANDLER = "rayclip.substitute"


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Replace our own special characters by plain ones and other characters by escapes, so that different names stay
    different."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_INSTEAD)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_HANDLER, _substitute)


def prepare() -> None:
    """Make standard output and standard error exist and accept any text.

    If one of them was closed, the next file opened would get its descriptor, and anything that a library prints would
    end up in that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        forgive(getattr(sys, name))


def forgive(stream: Any) -> None:
    """Make a stream print substitutes for characters that its encoding lacks, instead of raising an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != _HANDLER:
        stream.reconfigure(errors=_HANDLER)


def console(*, stderr: bool = False) -> "Console":
    """Return a rich console that is safe for users' own names: their brackets and colons are not treated as markup."""
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # the caller decides (progress continues, a table ends its command); rich would exit

    forgive(sys.stderr if stderr else sys.stdout)
    return OurConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def write_document(text: str, *, declares_utf8: bool) -> None:
    """Write a text to standard output, in UTF-8 if the text declares that encoding itself."""
    if declares_utf8 and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
        return
    forgive(sys.stdout)
    sys.stdout.write(text)


def flush() -> None:
    """Flush standard output and standard error; discard what cannot be written, so that Python does not complain at
    exit.

    Raises:
        BrokenPipeError: the reader of standard output is gone.
        UserError: standard output cannot be written, for example because its disk is full.
    """
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _drop(sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        raise
    except (OSError, ValueError) as error:
        _drop(sys.stdout)
        raise UserError(
            f"standard output cannot be written ({getattr(error, 'strerror', None) or error}): make room there, or "
            "send it elsewhere, and run again; what is finished is not computed again."
        ) from error


def _drop(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ------------------------------------------------------------------------------------------------------------ signals

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

"""Standard output and standard error as they are: not in UTF-8, closed, at the end of a pipe that nobody reads.

What a command has found must come out whatever the terminal can show.
"""

import codecs
import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any

from rayclip.types import UserError

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ends

# Where an encoding lacks our own signs
_INSTEAD = str.maketrans(
    {
        "–": "-", "—": "-", "−": "-", "─": "-", "━": "-", "╸": "-", "╺": "-", "…": "...", "·": ".", "×": "x", "÷": "/",
        "✓": "v", "✗": "x", "†": "+", "≥": ">=", "≤": "<=", "→": "->", "∞": "inf", "±": "+-", "°": " deg", "•": "*",
        "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip
_HANDLER = "rayclip.substitute"


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Our own signs by plain ones, letters of names by escapes: two names stay two."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_INSTEAD)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_HANDLER, _substitute)


def prepare() -> None:
    """Make standard output and standard error take every text, and be there.

    Where one of them was closed, the next file to be opened would get its number, and whatever a library prints would
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
    """Print what a stream's encoding lacks by substitutes, instead of raising an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != _HANDLER:
        stream.reconfigure(errors=_HANDLER)


def console(*, stderr: bool = False) -> "Console":
    """A rich console for what names people have chosen: no brackets or colons of theirs are markup."""
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # progress goes on, a table ends its command: not for rich, which would exit, to decide

    forgive(sys.stderr if stderr else sys.stdout)
    return OurConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def write_document(text: str, *, declares_utf8: bool) -> None:
    """Write a text to standard output; one that says of itself that it is UTF-8 is written so."""
    if declares_utf8 and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
        return
    forgive(sys.stdout)
    sys.stdout.write(text)


def flush() -> None:
    """Send what was printed; what cannot be sent is let go, so that Python does not complain of it at its end.

    Raises:
        BrokenPipeError: nobody reads standard output any more.
        UserError: it cannot be written; the disk behind it is full, say.
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

"""Run a command as a program: errors, signals and the exit code."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from rayclip.cli.options import refuse_repeats
from rayclip.terminal import INTERRUPTED, STOPPED, exit_code, listen
from rayclip.types import UserError

# Typer contains its own copy of click, whose exceptions are base classes of the one that Typer exports.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__


def run(command: Callable[..., Any], program: str) -> None:
    """Run a Typer application and exit.

    User errors end with one sentence and exit code 2, Ctrl-C and SIGTERM with one sentence and exit code 130 or 143.
    """
    from rayclip import terminal

    listen()
    terminal.prepare()
    if "--json-logs" in sys.argv:  # before Typer parses: its errors are logged as well
        from rayclip.progress import log_as_json

        log_as_json()
    try:
        if isinstance(command, typer.Typer):
            refuse_repeats(typer.main.get_command(command), sys.argv[1:])
        code = command(prog_name=program, standalone_mode=False)
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            _leave(2)
        hint = f" Try '{error.ctx.command_path} --help'." if isinstance(error, _UsageError) and error.ctx else ""
        _leave(_complain(error.format_message() + hint))
    except UserError as error:
        _leave(_complain(str(error)))
    except OSError as error:
        from rayclip.store import storage_failure

        explained = storage_failure(error)
        if explained is None:
            raise
        _leave(_complain(str(explained)))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # Typer itself also turns Ctrl-C into this code
        from rayclip.progress import say

        say("note", STOPPED)
        code = exit_code()
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """Flush the output, then exit."""
    from rayclip import terminal

    try:
        terminal.flush()
    except BrokenPipeError:
        code = terminal.BROKEN_PIPE
    except UserError as error:
        code = code or _complain(str(error))
    sys.exit(code)


def _complain(sentence: str) -> int:
    from rayclip.progress import say

    say("error", " ".join(sentence.split()))
    return 2

"""Where results go: whether something can be written there, found out before any work starts. Standard library only.

Looking at rights is not enough: a superuser may write everywhere, and yet not on a read-only disk or below `/proc`.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rayclip.types import UserError


def check_folder(option: str, place: str, *, done: str = "") -> None:
    """Raise a `UserError` if files could not be written into a folder that is there or would be made; an object store's
    URI may be anything. Leaves nothing behind.

    Args:
        option: what names the folder, for the sentence.
        done: the file in it that says that all is there, and nothing has to be written any more.
    """
    if "://" in place:
        return
    with _explained(option, place, "no file can be written there", "folder"):
        path = Path(place).expanduser().absolute()
        if done and (path / done).is_file():
            return
        missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
        there = (path, *path.parents)[len(missing)]
        if not there.is_dir():
            what = "that" if there == path else str(there)
            raise UserError(f"{option} {place}: {what} is {_kind(there)}: give a folder.")
        made = []
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                made.append(folder)
            with tempfile.TemporaryFile(dir=path):
                pass
        finally:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # somebody else has put something in it meanwhile
                    folder.rmdir()


def check_file(option: str, place: str | Path, *, example: str = "") -> None:
    """Raise a `UserError` if a file could not be written; a device or a pipe is none that could be replaced by one.

    Args:
        option: what names the file, for the sentence.
        example: a name that would do where a folder is given.
    """
    with _explained(option, str(place), "it cannot be written", "file"):
        path = Path(place).expanduser().absolute()
        if not path.parent.is_dir():
            raise UserError(f"{option} {place}: there is no folder {path.parent}.")
        if path.is_dir():
            raise UserError(f"{option} {place} is a folder: give a file{f' such as {path / example}' * bool(example)}.")
        if path.exists() and not path.is_file():
            raise UserError(f"{option} {place} is {_kind(path)}: give a file.")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def check_stream(option: str, place: str) -> None:
    """Raise a `UserError` if nothing could be written to a file in place; a device or a pipe will do."""
    path = Path(place).expanduser().absolute()
    if path.exists() and not path.is_dir():
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {place}: it cannot be written: mend its rights, or give another file.")
        return
    check_file(option, place)


@contextlib.contextmanager
def _explained(option: str, place: str, what: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a home that nobody has
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{option} {place}: {what} ({reason}): give another {kind}.") from error


def _kind(path: Path) -> str:
    if path.is_file():
        return "a file"
    return "a link to nothing" if path.is_symlink() and not path.exists() else "no file but a device or a pipe"

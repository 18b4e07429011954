"""Prepare a Ray session: a folder short enough for its sockets, and imports in workers that match the driver's."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

from rayclip.types import UserError

_TMPDIR = "RAY_TMPDIR"  # variable that makes Ray keep its files in another folder than TMPDIR
_SOCKET_BYTES = 107 if sys.platform == "linux" else 103  # maximum bytes of a Unix socket's path
_SUFFIX_BYTES = len("/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1")  # what Ray appends
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "~")


def ray_folder() -> Path:
    """Return the folder in which Ray keeps its files by default."""
    return Path(os.environ.get(_TMPDIR) or os.environ.get("TMPDIR") or "/tmp")


def why_unsuitable(folder: Path) -> str | None:
    """Return the reason why Ray cannot keep its sockets in a folder; None if it can."""
    path = os.fsencode(folder.absolute())
    if len(path) > _SOCKET_BYTES - _SUFFIX_BYTES:
        return f"is {len(path)} bytes long and Ray's sockets leave room for {_SOCKET_BYTES - _SUFFIX_BYTES}"
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError:
        return "cannot be written"


@contextmanager
def environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables in the block (None unsets), and put them back after it."""
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def short_folder() -> Iterator[None]:
    """Make Ray use a short temporary folder in this block, if it cannot keep its sockets in the usual one.

    The folder is private to the user, has an unpredictable name and is deleted after the block. Everything else stays
    in `TMPDIR`.

    Raises:
        UserError: no suitable folder exists.
    """
    usual = ray_folder()
    reason = why_unsuitable(usual)
    if reason is None:
        yield
        return
    folder = _make_short(usual, reason)
    try:
        with environment({_TMPDIR: str(folder)}):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_short(usual: Path, reason: str) -> Path:
    for place in _SHORT_FOLDERS:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="rc-", dir=Path(place).expanduser()))  # with mode 700
            if why_unsuitable(folder) is None:
                return folder
            folder.rmdir()
    raise UserError(
        f"Ray has no place for its sockets, since {usual} {reason}: set {_TMPDIR} to a short folder of yours."
    )


def check_environment() -> list[str]:
    """Return sentences for `rayclip doctor` on problems that Ray has in this environment, and their workarounds."""
    found, folder = [], ray_folder()
    reason = why_unsuitable(folder)
    if reason is not None:
        with short_folder():
            found.append(f"{folder} {reason}: a private Ray keeps them in a short folder such as {ray_folder()}")
    names = find_shadowing()
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        found.append(f"{listed} here: named like installed packages, which are imported all the same")
    return found


def find_shadowing() -> list[str]:
    """Return files and folders of the working directory that Ray's workers would import instead of installed packages.

    This process itself imports the installed packages.
    """
    unwanted = _extra_import_folder()
    if unwanted is None:
        return []
    here = Path(unwanted)
    elsewhere = [place for place in sys.path if place]
    found = []
    for entry in sorted(here.iterdir()):
        name = entry.name if entry.is_dir() else entry.name.removesuffix(".py")
        if (entry.suffix != ".py" and not entry.is_dir()) or not name.isidentifier():
            continue
        mine = PathFinder.find_spec(name, [str(here)])
        if mine is not None and mine.loader is not None and PathFinder.find_spec(name, elsewhere) is not None:
            found.append(entry.name)
    return found


def make_import_hook() -> Callable[[], None] | None:
    """Return a start-up function for workers, so that they import the same as this process; None if they do anyway.

    Ray puts the driver's working directory first in its workers' import path, even if the driver itself, an installed
    command, does not import from there.
    """
    unwanted = _extra_import_folder()
    if unwanted is None:
        return None

    def hook() -> None:  # a closure, which Ray pickles by value: the worker has not imported rayclip yet
        import sys

        class Dropper:
            """An import finder that finds nothing, but removes the directory that Ray adds with its first task.

            Python asks it before every import.
            """

            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> None:
                while unwanted in sys.path:
                    sys.path.remove(unwanted)

        if unwanted not in sys.path:  # otherwise the node itself was started to import from there
            sys.meta_path.insert(0, Dropper)

    return hook


def _extra_import_folder() -> str | None:
    """Return the working directory if workers would import from it but this process does not; else None."""
    try:
        here = Path.cwd()
        others = not _imports_from(here) and any(_may_be_imported(entry) for entry in here.iterdir())
    except OSError:  # it is gone or cannot be read: nothing is imported from it
        return None
    return str(here) if others else None


def _imports_from(folder: Path) -> bool:
    """Return whether this process imports from a folder."""
    return any(os.path.realpath(place) == os.path.realpath(folder) for place in sys.path)  # "" is the working directory


def _may_be_imported(entry: Path) -> bool:
    return entry.name.partition(".")[0].isidentifier() and (entry.suffix in (".py", ".so", ".pyc") or entry.is_dir())

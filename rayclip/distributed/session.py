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
    before = {name: os.environ[name] for name in settings if name in os.environ}

    def replace(values: Mapping[str, str | None]) -> None:
        for name in settings:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in values.items() if value is not None})

    replace(settings)
    try:
        yield
    finally:
        replace(before)


@contextmanager
def short_folder() -> Iterator[None]:
    """Make Ray use a short temporary folder in this block, if it cannot keep its sockets in the usual one.

    The folder is the user's alone and deleted after the block; other files stay in `TMPDIR`. Raises a `UserError` if
    there is no suitable one.
    """
    usual = ray_folder()
    reason = why_unsuitable(usual)
    if reason is None:
        yield
        return
    for place in _SHORT_FOLDERS:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="rc-", dir=Path(place).expanduser()))  # with mode 700
            if why_unsuitable(folder) is None:
                break
            folder.rmdir()
    else:
        raise UserError(
            f"Ray has no place for its sockets, since {usual} {reason}: set {_TMPDIR} to a short folder of yours."
        )
    try:
        with environment({_TMPDIR: str(folder)}):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    elsewhere = [place for place in sys.path if place]
    found = []
    for entry in sorted(Path(unwanted).iterdir()):
        name = entry.name if entry.is_dir() else entry.name.removesuffix(".py")
        mine = PathFinder.find_spec(name, [unwanted]) if name.isidentifier() else None
        if mine is not None and mine.loader is not None and PathFinder.find_spec(name, elsewhere) is not None:
            found.append(entry.name)
    return found


def make_import_hook() -> Callable[[], None] | None:
    """Return a start-up function for workers, so that they import the same as this process; None if they do anyway.

    Ray puts the driver's working directory first in their import path, also if the driver does not import from there.
    """
    unwanted = _extra_import_folder()
    if unwanted is None:
        return None

    def hook() -> None:  # a closure, which Ray pickles by value: the worker has not imported rayclip yet
        import sys

        class Dropper:
            """An import finder that finds nothing, but removes the directory that Ray adds with its first task."""

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
        if os.path.realpath(here) in map(os.path.realpath, sys.path):  # "" is the working directory
            return None
        for entry in here.iterdir():
            is_module = entry.suffix in (".py", ".so", ".pyc") or entry.is_dir()
            if is_module and entry.name.partition(".")[0].isidentifier():
                return str(here)
    except OSError:  # it is gone or cannot be read: nothing is imported from it
        pass
    return None

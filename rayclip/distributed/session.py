"""Where a private Ray keeps its sockets, and what its workers import."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

from rayclip.types import UserError

_PLACE = "RAY_TMPDIR"  # by which Ray is told to keep its files elsewhere than in TMPDIR
_LONGEST = 107 if sys.platform == "linux" else 103  # bytes of a Unix socket's path
_BELOW = len("/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1")  # where Ray puts them
_SHORT = ("/tmp", "/var/tmp", "/dev/shm", "~")


def ray_folder() -> Path:
    """Where Ray keeps its files unless it is told otherwise."""
    return Path(os.environ.get(_PLACE) or os.environ.get("TMPDIR") or "/tmp")


def why_not(folder: Path) -> str | None:
    """Why Ray cannot keep its sockets in a folder; None if it can."""
    path = os.fsencode(folder.absolute())
    if len(path) > _LONGEST - _BELOW:
        return f"is {len(path)} bytes long and Ray's sockets leave room for {_LONGEST - _BELOW}"
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError:
        return "cannot be written"


@contextmanager
def short_folder() -> Iterator[None]:
    """A folder for the Ray that starts in this block, where the usual one is none for it: the user's own, which nobody
    else can read or foresee, and which goes with the block. Everything else keeps to `TMPDIR`.

    Raises:
        UserError: there is none.
    """
    usual = ray_folder()
    reason = why_not(usual)
    if reason is None:
        yield
        return
    folder, before = _make_short(usual, reason), os.environ.get(_PLACE)
    os.environ[_PLACE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PLACE]
        else:
            os.environ[_PLACE] = before
        shutil.rmtree(folder, ignore_errors=True)


def _make_short(usual: Path, reason: str) -> Path:
    for place in _SHORT:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="rc-", dir=Path(place).expanduser()))  # with mode 700
            if why_not(folder) is None:
                return folder
            folder.rmdir()
    raise UserError(
        f"Ray has no place for its sockets, since {usual} {reason}: set {_PLACE} to a short folder of yours."
    )


def surroundings() -> list[str]:
    """What of this place Ray would not bear by itself, and how it is dealt with, in sentences: for `rayclip doctor`."""
    found, folder = [], ray_folder()
    reason = why_not(folder)
    if reason is not None:
        with short_folder():
            found.append(f"{folder} {reason}: a private Ray keeps them in a short folder such as {ray_folder()}")
    names = shadowing()
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        found.append(f"{listed} here: named like installed packages, which are imported all the same")
    return found


def shadowing() -> list[str]:
    """Files and folders of the working directory that Ray's workers would import ahead of what this process imports."""
    unwanted = _unwanted()
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


def import_as_here() -> Callable[[], None] | None:
    """What workers have to do first, to import what this process imports; None if they do anyway.

    Ray puts the driver's working directory ahead of everything that its workers import, also where the driver itself,
    a command that was installed, does not import from there.
    """
    unwanted = _unwanted()
    if unwanted is None:
        return None

    def start() -> None:  # a closure, which Ray carries by value: the worker has imported nothing of ours yet
        import sys

        class Dropper:
            """Asked ahead of every import, it finds nothing, but takes away what Ray adds with its first task."""

            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> None:
                while unwanted in sys.path:
                    sys.path.remove(unwanted)

        if unwanted not in sys.path:  # or the node itself was started to import from there
            sys.meta_path.insert(0, Dropper)

    return start


def _unwanted() -> str | None:
    """The working directory, if workers alone would import from it."""
    try:
        here = Path.cwd()
        others = not _imports_from(here) and any(_may_be_imported(entry) for entry in here.iterdir())
    except OSError:  # it is gone, or not ours to read: nobody imports from it
        return None
    return str(here) if others else None


def _imports_from(folder: Path) -> bool:
    """Whether this process imports from there."""
    return any(os.path.realpath(place) == os.path.realpath(folder) for place in sys.path)  # "" is the working directory


def _may_be_imported(entry: Path) -> bool:
    return entry.name.partition(".")[0].isidentifier() and (entry.suffix in (".py", ".so", ".pyc") or entry.is_dir())

"""Paths on the command line: parse them, and check that they can be written before any work starts; temporary folders.

At import standard library only. Checking permissions is not enough: a superuser has them everywhere, but still cannot
write to a read-only disk or below `/proc`. So the checks write a temporary file.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from rayclip.types import UserError

_TEMPORARY, _LOCK = "rayclip-", ".lock"  # begin of the names of temporary folders; the file in each that is locked
# A `~` that the shell does not expand: after `local-dir:`, `captions=` or a comma, in quotes, after `--data=`.
_HOME = re.compile(r"(?:(?<=^)|(?<=[:=,]))~(?=/|$)")
# Options after the path of a data set: `#holdout`, `#label=fine_label`
_OPTIONS = re.compile(r"(?:#(?:holdout|validation|[a-z-]+=[^#,]*))*$")


def expand_home(text: str) -> str:
    """Replace each `~` that begins a path by the home folder: `~/a`, `local-dir:~/a`, `captions=~/a`, `a,~/b`."""
    return _HOME.sub(lambda _: str(Path.home()), text)


def split_places(values: str | Iterable[str], exists: Callable[[Path], bool] = Path.exists) -> list[str]:
    """Split the values of an option at commas into places, in order; a path that exists is not split.

    Args:
        values: one value or several; each may hold several comma-separated places. Options after a path (`#holdout`,
            `#label=fine_label`) stay with it.
        exists: tells whether a path exists; replaceable in tests.

    Returns:
        The non-empty places, with `~` replaced by the home folder.
    """
    found: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        parts = expand_home(value).split(",")
        while parts:
            # Prefer the longest prefix that is a path: `a,b.parquet` before `a`.
            whole = (n for n in range(len(parts), 1, -1) if _is_path(",".join(parts[:n]), exists))
            count = next(whole, 1)
            found.append(",".join(parts[:count]).strip())
            parts = parts[count:]
    return [place for place in found if place]


def plain_dataset(name: str) -> str:
    """Return a data set's name without file ending, split or part: `cifar10-test` becomes `cifar10`."""
    stem = PurePosixPath(name.partition("#")[0]).name.removesuffix(".parquet")
    return re.sub(r"[-_](train|test|val|validation)$", "", stem)


def _is_path(text: str, exists: Callable[[Path], bool]) -> bool:
    text = text.strip()
    try:
        return any(exists(Path(place)) for place in (text, _OPTIONS.sub("", text)) if place)
    except OSError:  # longer than a path can be
        return False


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder, which is deleted after the block; delete those that killed processes of this user have left.

    Each is locked as long as its process lives, in whatever container, and has its name only once it is.
    """
    from filelock import FileLock, Timeout

    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError, Timeout):
            if left.lstat().st_uid == os.getuid() and (left / _LOCK).is_file():
                with FileLock(left / _LOCK).acquire(timeout=0):
                    shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=f".{_TEMPORARY}", dir=place))
    folder = made.with_name(made.name[1:])
    try:
        with FileLock(made / _LOCK):
            made.rename(folder)
            (folder / "files").mkdir()
            yield folder / "files"
    finally:
        for each in (folder, made):
            shutil.rmtree(each, ignore_errors=True)


def check_folder(option: str, place: str, *, done: str = "") -> None:
    """Raise a `UserError` if files cannot be written into a folder, existing or yet to be created. Object-store URIs
    are not checked. Leaves nothing behind.

    Args:
        option: the option that names the folder, for the message.
        done: a file whose presence in the folder means that everything is already written, so nothing is checked.
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
                with contextlib.suppress(OSError):  # another process may have put something in it meanwhile
                    folder.rmdir()


def check_file(option: str, place: str | Path, *, example: str = "") -> None:
    """Raise a `UserError` if a file cannot be written. Devices and pipes are refused, since a file cannot replace them.

    Args:
        option: the option that names the file, for the message.
        example: a file name to suggest if a folder is given.
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
    """Raise a `UserError` if `place` cannot be opened for writing; devices and pipes are allowed."""
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
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a home folder of no known user
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{option} {place}: {what} ({reason}): give another {kind}.") from error


def _kind(path: Path) -> str:
    if path.is_file():
        return "a file"
    return "a link to nothing" if path.is_symlink() and not path.exists() else "no file but a device or a pipe"

"""Parse file and data-set paths from the command line: `~` for the home folder, several separated by commas."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

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


def _is_path(text: str, exists: Callable[[Path], bool]) -> bool:
    text = text.strip()
    try:
        return any(exists(Path(place)) for place in (text, _OPTIONS.sub("", text)) if place)
    except OSError:  # longer than a path can be
        return False

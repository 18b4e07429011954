"""Places as people write them on the command line: `~` for their home, several of them with commas between."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

# A `~` that a shell leaves as it is: behind `local-dir:`, `captions=` or a comma, in quotes, after `--data=`.
_HOME = re.compile(r"(?:(?<=^)|(?<=[:=,]))~(?=/|$)")
# What follows the place of a data set: `#holdout`, `#label=fine_label`
_OPTIONS = re.compile(r"(?:#(?:holdout|validation|[a-z-]+=[^#,]*))*$")


def expand_home(text: str) -> str:
    """`text` with the home folder for each `~` that begins a path: `~/a`, `local-dir:~/a`, `captions=~/a`, `a,~/b`."""
    return _HOME.sub(lambda _: str(Path.home()), text)


def split_places(values: str | Iterable[str], exists: Callable[[Path], bool] = Path.exists) -> list[str]:
    """The places in the values of an option, in order: split at commas, but what exists as a path stays whole.

    Args:
        values: one value or several; each may hold several places with commas between. What follows a `#` behind a
            path (`#holdout`, `#label=fine_label`) belongs to it.
        exists: whether there is such a path; for tests.

    Returns:
        Without empty ones, `~` replaced by the home folder.
    """
    found: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        parts = expand_home(value).split(",")
        while parts:
            # The longest beginning that is a path: `a,b.parquet` before `a`.
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

"""Parse data sets from the command line: a place, options for reading it, and the part of it to use.

PLACE[#coop][#image=COLUMN][#label=COLUMN][#labels-from=1][#names=FILE][#holdout][#validation]
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from rayclip.data.images import Resolution
from rayclip.data.labels import Reading, read_class_names
from rayclip.data.manifest import Names
from rayclip.paths import expand_home, plain_dataset
from rayclip.types import UserError

COOP = "-coop"  # what `NAME#coop`, a data set in CoOp's split, is called on disk
HOLDOUT = "#holdout"
VALIDATION = "#validation"
_KEYS = {"image": "image", "label": "label", "labels-from": "labels_from", "names": "names"}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed `PLACE#…`. `part` is `""`, `#holdout`, `#validation` or `#holdout#validation`."""

    place: str
    reading: Reading = dataclasses.field(default_factory=Reading)
    part: str = ""

    def __str__(self) -> str:
        values = ((key, getattr(self.reading, field)) for key, field in _KEYS.items())
        return f"{self.place}{''.join(f'#{key}={value}' for key, value in values if value)}{self.part}"


def parse_spec(text: str) -> Spec:
    """Parse a data set as written on the command line; `~` is the home folder. Raises `UserError`: unknown option after
    a `#`."""
    text = expand_home(text)
    if "#" not in text or _exists(text):  # a file name may contain `#`
        return Spec(place=text)
    place, *words = text.split("#")
    while (
        words and "=" not in words[0] and f"#{words[0]}" not in (HOLDOUT, VALIDATION) and _exists(f"{place}#{words[0]}")
    ):
        place = f"{place}#{words.pop(0)}"
    if words and words[0] == "coop":
        place, words = place + COOP, words[1:]
    values: dict[str, str | int] = {}
    part = ""
    for word in words:
        key, equals, value = word.partition("=")
        if f"#{word}" in (HOLDOUT, VALIDATION):
            part += f"#{word}"
        elif not equals or key not in _KEYS or not value:
            known = ", ".join(f"#{key}=…" for key in _KEYS)
            raise UserError(f"'#{word}' behind {place} means nothing: there are {known}, {HOLDOUT} and {VALIDATION}.")
        elif key == "labels-from":
            if value not in ("0", "1"):
                raise UserError(f"#labels-from={value} behind {place}: labels are counted from 0 or from 1.")
            values[_KEYS[key]] = int(value)
        else:
            values[_KEYS[key]] = str(Path(expand_home(value)).absolute()) if key == "names" else value
    return Spec(place=place, reading=Reading(**values), part=part)  # type: ignore[arg-type]


def choose_names(written: str, data: Sequence[str]) -> tuple[Names, list[str]]:
    """Interpret `--class-names`: return the spelling to use, and the data sets with `#names=FILE` added if it names a
    file. Raises `UserError` if it is neither."""
    for spelling in get_args(Names):
        if written == spelling:
            return spelling, list(data)
    if not Path(expand_home(written)).is_file():
        raise UserError(
            f"--class-names {written} is none of curated and raw, and no file: give a file with one class name per "
            "line in label order, or a JSON list."
        )
    read_class_names(written)
    path = str(Path(expand_home(written)).absolute())
    specs = [parse_spec(text) for text in data]
    return "curated", [str(dataclasses.replace(s, reading=dataclasses.replace(s.reading, names=path))) for s in specs]


def split_resolution(text: str) -> tuple[Resolution, list[str] | None]:
    """Parse `--resolution native|model|clip`, or `native:NAMES` and `native:NAMES,clip`: return the resolution, and the
    data sets that are attacked at their own in place of it, None if none are named. Raises `UserError` if it is
    nothing of these."""
    kind, colon, rest = text.partition(":")
    names, comma, others = rest.partition(",")
    listed = [name for name in names.split("+") if name]
    chosen = (others if comma else "model") if colon else kind
    if chosen not in get_args(Resolution) or (colon and (kind != "native" or not listed or chosen == "native")):
        raise UserError(
            f"--resolution {text} means nothing: write native, model, clip, or native:cifar10+stl10 for some data sets "
            "at their own size and the others at the model's (native:cifar10+stl10,clip for these in CLIP's way)."
        )
    return cast(Resolution, chosen), listed if colon else None


def published_name(dataset: str) -> str:
    """Return the name of a data set without split, part and form: `caltech101-coop`, `caltech101-test` are
    `caltech101`."""
    return plain_dataset(dataset).removesuffix(COOP)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False

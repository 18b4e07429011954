"""Class names that users give, and how the labels of their data fit them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rayclip.paths import expand_home
from rayclip.types import UserError

MISSING = -1  # written by the datasets library for an image without a label
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options for reading data that does not describe itself fully.

    Attributes:
        image, label: the columns; None to detect them.
        labels_from: the label of the first class, 0 or 1.
        names: file of class names; None for the data's own names.
    """

    image: str | None = None
    label: str | None = None
    labels_from: Literal[0, 1] = 0
    names: str | None = None

    def class_names(self) -> tuple[str, ...] | None:
        """Read the class names from the file; None without one. Raises `UserError`."""
        return None if self.names is None else read_class_names(self.names)

    def decisive(self) -> dict[str, str | int]:
        """Return the options that affect which images are read and with which labels: all but the class names."""
        return {k: v for k, v in asdict(self).items() if v and k != "names"}


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises `UserError` if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: save it as UTF-8, or fetch it again.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` if it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({str(error)[:120]}): write or fetch it again.") from error


def plain_text(value: Any) -> str:
    """Return a stripped text; empty if it is no text, or not valid UTF-8 (JSON may hold lone surrogates)."""
    if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
        return ""
    return value.strip()


def read_class_names(place: str | Path, *, plain: bool = False) -> tuple[str, ...]:
    """Read class names in label order from a file.

    Text: one name per line, in label order, or numbered lines (counted from 0 or 1, as in `0 cat`) in any order. JSON:
    a list, or an object from label to name or from name to label, labels from 0 (`id2label`, `label2id`).

    Args:
        plain: whether each line is a name, whatever it looks like.

    Raises:
        UserError: no such file, or another format.
    """
    path = Path(expand_home(str(place)))
    if not path.is_file():
        raise UserError(
            f"no such file of class names: {path}; it needs one name per line in label order, or a JSON list."
        )
    text = read_text(path)
    if not plain and text.lstrip()[:1] in ("[", "{"):
        raw = read_json(path)
        if isinstance(raw, dict):
            if all(isinstance(v, int) and not isinstance(v, bool) for v in raw.values()):
                raw = {str(v): k for k, v in raw.items()}
            raw = [raw.get(str(label)) for label in range(len(raw))]
        if not all(map(plain_text, raw)):
            raise UserError(
                f"{path} is no list of class names: write a JSON list of texts, or an object with every label from 0."
            )
        names = tuple(" ".join(name.split()) for name in raw)
    else:
        lines = tuple(" ".join(line.split()) for line in text.rstrip().splitlines())
        names = lines if plain else _in_label_order(lines)
    if "" in names:
        raise UserError(f"{path} has an empty line, {names.index('') + 1}: it must have one class name per line.")
    if len(names) < 2:
        raise UserError(f"{path} must name at least two classes; it names {len(names)}.")
    return names


def _in_label_order(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Sort numbered lines and take off the numbers, which are counted from 0 or 1; return other lines as they are."""
    numbered = [re.fullmatch(r"(\d+)[:.,;)]? (.+)", line) for line in lines]
    by_number = {int(m[1]): m[2] for m in numbered if m}
    for first in (0, 1):
        if all(numbered) and by_number.keys() == set(range(first, first + len(lines))):
            return tuple(by_number[number] for number in sorted(by_number))
    return lines


def with_given_names(own: tuple[str, ...], given: tuple[str, ...], origin: str) -> tuple[tuple[str, ...], str | None]:
    """Apply given class names, from the file `origin`, to data that may have `own` names; labels keep their meaning.
    The given ones are another spelling of the own names in any order, or other names in label order.

    Returns:
        The names in label order, and a note for users if other names replace the data's own.
    """
    if not own or own == given:
        return given, None
    if spelled := spell_alike(own, given):
        return spelled, None
    pairs = [f"'{a}' is '{b}'" for a, b in zip(own, given, strict=False) if fold_name(a) != fold_name(b)]
    if len(given) != len(own):
        pairs.append(f"it names {len(given)} classes, the data {len(own)}")
    return given, f"Its own class names are replaced, by their order, by those of {origin}: {first_few(pairs)}."


def spell_alike(own: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """Return the own names in the given spelling; empty unless each has exactly one in `given`."""
    spelling = {fold_name(name): name for name in given}
    folded = [fold_name(name) for name in own]
    if len(spelling) == len(given) and len(set(folded)) == len(own) and spelling.keys() == set(folded):
        return tuple(spelling[name] for name in folded)
    return ()


@dataclass(frozen=True)
class Labels:
    """How values in the data become labels.

    Attributes:
        class_names: in label order.
        own_names: as the data spell them; empty if they have none.
        number_of: text in the data -> label, counted as in the data.
        first: the label of the first class in the data.
        from_1: advice where labels seem to be counted from 1.
        column: where the labels are, for messages.
        notes: a remark for users if given names replace the data's own.
    """

    class_names: tuple[str, ...]
    own_names: tuple[str, ...]
    number_of: Mapping[str, int] = field(repr=False)
    first: int
    from_1: str
    column: str
    notes: tuple[str, ...]

    @classmethod
    def choose(
        cls, own: tuple[str, ...], reading: Reading, *, from_1: str, texts: bool = True, column: str = ""
    ) -> "Labels":
        """Choose between the data's `own` class names and those given; `texts` are labels that name a class."""
        given = reading.class_names()
        names, note = (own, None) if given is None else with_given_names(own, given, str(reading.names))
        number_of = {text: number for number, text in enumerate(own or names, reading.labels_from)} if texts else {}
        return cls(names, own, number_of, reading.labels_from, from_1, column, (note,) if note else ())

    def numbers(self, where: str, distinct: Iterable[Any]) -> dict[Any, int]:
        """Map each distinct value to its label, counted as in the data; `MISSING` for missing labels. Raises
        `UserError` for values that are no labels, or labels of no class."""
        numbers: dict[Any, int] = {}
        wrong = []
        for value in distinct:
            try:
                numbers[value] = self.number(value)
            except (ValueError, OverflowError) as error:
                wrong.append(str(error))
        if wrong:
            wrong.sort()  # sets have another order in each process
            raise UserError(f"{where} has labels in its column '{self.column}' that name no class: {first_few(wrong)}.")
        self.check(where, numbers.values())
        return numbers

    def number(self, value: Any) -> int:
        """Return the label of one value; see `numbers`. Raises `ValueError` for a value that is none."""
        if value is None or value != value:
            return MISSING
        if isinstance(value, str):
            if value in self.number_of:
                return self.number_of[value]
            if not re.fullmatch(r"\s*-?\d{1,18}\s*", value):
                raise ValueError(f"the label {value[:40]!r} is no number and no class name")
        elif value != int(value):
            raise ValueError(f"{value} is no whole number")
        return int(value)

    def check(self, where: str, labels: Iterable[int]) -> None:
        """Raise a `UserError` unless labels, counted as in the data, fit the class names; `MISSING` is ignored. No
        sample is set aside for a label that does not fit: others may be shifted."""
        first, classes = self.first, len(self.class_names)
        found = sorted(set(labels) - {MISSING})
        outside = [label for label in found if not first <= label < first + classes]
        if not outside:
            return
        if first == 0 and found[0] >= 1 and found[-1] == classes:
            raise UserError(
                f"{where} has labels from {found[0]} to {found[-1]} for {classes} class names, which are labels 0 to "
                f"{classes - 1}: they seem to be counted from 1: {self.from_1}."
            )
        shown = first_few([str(label) for label in outside])
        plural = "labels" if len(outside) > 1 else "the label"
        many = f" ({found[-1] - first + 1} classes)" if found[0] == first and found[-1] - first == classes else ""
        raise UserError(
            f"{where} has {plural} {shown}{many}, but {classes} class names, which are labels {first} to "
            f"{first + classes - 1}: name every class with --class-names FILE, one name per line in label order, or "
            "correct the labels."
        )


def notes_on_classes(
    names: Sequence[str], counts: Sequence[int], raw: Sequence[str] | None = None, split: str = "", remedy: str = ""
) -> list[str]:
    """Return notes for readers of the numbers: classes without images (`counts`), classes that share a name, names that
    are only numbers. `raw` are the source's own names; `remedy` is advice for labels that are counted from 1."""
    notes = []
    images = f"{split} images".lstrip()
    empty = [f"'{name}'" for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        hint = f" If its labels are counted from 1, {remedy}." if remedy and not counts[0] and counts[1] else ""
        notes.append(f"Classes without {images}: {len(empty)} ({first_few(empty)}).{hint}")
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        labels.setdefault(name, []).append(label)
    for name, same in labels.items():
        if len(same) > 1:
            spelled = " and ".join(f"'{raw[label]}'" for label in same) if raw and raw != names else ""
            before = f" ({spelled})" if spelled else ""
            notes.append(
                f"Classes {' and '.join(map(str, same))}{before} are both called '{name}': nothing can tell them apart."
            )
    if all(name.isdecimal() for name in names):
        notes.append(
            f"The class names are numbers ({first_few(names)}), and so are the prompts: --class-names FILE names them."
        )
    return notes


def first_few(texts: Sequence[str]) -> str:
    """List the first few texts and the number of the others."""
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")


def fold_name(name: str) -> str:
    """Return a class name case-folded, without blanks and punctuation."""
    return "".join(c for c in name.casefold() if c.isalnum())

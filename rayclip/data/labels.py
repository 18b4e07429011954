"""Read class names that users give, and check that labels fit them."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rayclip.paths import expand_home
from rayclip.types import UserError

MISSING = -1  # written by the datasets library for an image without a label
_SHOWN = 5


def read_class_names(place: str | Path) -> tuple[str, ...]:
    """Read class names in label order from a file.

    Text: one name per line, in label order, or numbered lines (counted from 0 or 1, as in `0 cat`) in any order. JSON:
    a list, or an object from label to name or from name to label, labels from 0 (`id2label`, `label2id`).

    Raises:
        UserError: no such file, or another format.
    """
    path = Path(expand_home(str(place)))
    if not path.is_file():
        raise UserError(
            f"no such file of class names: {path}; it needs one name per line in label order, or a JSON list."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: save it as UTF-8, one class name per line.") from error
    names = _from_json(path, text) if text.lstrip()[:1] in ("[", "{") else _from_lines(path, text)
    if len(names) < 2:
        raise UserError(f"{path} must name at least two classes; it names {len(names)}.")
    return names


def _from_lines(path: Path, text: str) -> tuple[str, ...]:
    lines = [" ".join(line.split()) for line in text.rstrip().splitlines()]
    if "" in lines:
        raise UserError(f"{path} has an empty line, {lines.index('') + 1}: it must have one class name per line.")
    numbered = [re.fullmatch(r"(\d+)[:.,;)]? (.+)", line) for line in lines]
    if lines and all(numbered):
        by_number = {int(m[1]): m[2] for m in numbered if m}
        for first in (0, 1):
            if by_number.keys() == set(range(first, first + len(lines))):
                return tuple(by_number[number] for number in sorted(by_number))
    return tuple(lines)


def _from_json(path: Path, text: str) -> tuple[str, ...]:
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({error}): write a list of class names.") from error
    if isinstance(raw, dict):
        if all(isinstance(v, int) and not isinstance(v, bool) for v in raw.values()):
            raw = {str(v): k for k, v in raw.items()}
        raw = [raw.get(str(label)) for label in range(len(raw))]
    if not isinstance(raw, list) or not all(isinstance(name, str) and name.strip() for name in raw):
        raise UserError(
            f"{path} is no list of class names: write a JSON list of texts, or an object with every label from 0."
        )
    return tuple(" ".join(name.split()) for name in raw)


def with_given_names(own: tuple[str, ...], given: tuple[str, ...], origin: str) -> tuple[tuple[str, ...], str | None]:
    """Apply given class names, from the file `origin`, to data that may have `own` names; labels keep their meaning.
    The given ones are another spelling of the own names in any order, or other names in label order.

    Returns:
        The names in label order, and a note for users if other names replace the data's own.
    """
    if not own or own == given:
        return given, None
    by_spelling = {fold_name(name): name for name in given}
    spelled = [fold_name(name) for name in own]
    if len(by_spelling) == len(given) and len(set(spelled)) == len(own) and by_spelling.keys() == set(spelled):
        return tuple(by_spelling[name] for name in spelled), None
    pairs = [f"'{a}' is '{b}'" for a, b in zip(own, given, strict=False) if fold_name(a) != fold_name(b)]
    if len(given) != len(own):
        pairs.append(f"it names {len(given)} classes, the data {len(own)}")
    return given, f"Its own class names are replaced, by their order, by those of {origin}: {first_few(pairs)}."


def check_labels(where: str, labels: Iterable[int], classes: int, first: int, from_1: str) -> None:
    """Raise a `UserError` unless `labels`, counted as in the data, fit the class names; `MISSING` is ignored. No sample
    is set aside for a label that does not fit: others may be shifted. `from_1` says what to do if they are counted from
    1."""
    found = sorted(set(labels) - {MISSING})
    outside = [label for label in found if not first <= label < first + classes]
    if not outside:
        return
    if first == 0 and found[0] >= 1 and found[-1] == classes:
        raise UserError(
            f"{where} has labels from {found[0]} to {found[-1]} for {classes} class names, which are labels 0 to "
            f"{classes - 1}: they seem to be counted from 1: {from_1}."
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
    numbers = [name for name in names if name.isdecimal()]
    if len(numbers) == len(names):
        notes.append(
            f"The class names are numbers ({first_few(numbers)}), and so are the prompts: --class-names FILE names "
            "them."
        )
    return notes


def first_few(texts: Sequence[str]) -> str:
    """List the first few texts and the number of the others."""
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")


def fold_name(name: str) -> str:
    """Return a class name case-folded, without blanks and punctuation."""
    return "".join(c for c in name.casefold() if c.isalnum())

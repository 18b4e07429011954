"""Match our numbers with published ones: of the same model, under the same attack, and how their protocols differ."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rayclip.data.registry import DATASETS
from rayclip.data.spec import COOP
from rayclip.names import find_protocol
from rayclip.paths import plain_dataset
from rayclip.reports.model import Model
from rayclip.reports.published import Published, letters, numbers_of, papers
from rayclip.reports.recalls import RecallTable, recalls_of
from rayclip.reports.section import AVERAGE, Attack, Number, Section, Subject, average

# Keys of a protocol that are compared separately
_NOT_OURS = ("datasets", "attack", "model", "images", "train_eps", "defense", "defense_steps", "defense_step")

_OPENAI = {  # in transformers' layout
    f"hf:openai/clip-vit-{size}": f"{name}:openai"
    for size, name in {"base-patch32": "ViT-B-32", "base-patch16": "ViT-B-16", "large-patch14": "ViT-L-14"}.items()
}


@dataclass(frozen=True, kw_only=True)
class Ours:
    """All our numbers."""

    sections: Sequence[Section]
    tables: Sequence[RecallTable]

    @property
    def datasets(self) -> set[str]:
        named = {d for section in self.sections for d in section.datasets} | {table.dataset for table in self.tables}
        return {plain_dataset(name).removesuffix("_captions") for name in named}

    @property
    def subjects(self) -> list[Subject]:
        searched = (subject for table in self.tables for subject, _ in table.rows)
        return [*(subject for section in self.sections for subject in section.subjects), *searched]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A published number beside one of ours; `differs`: how their protocols differ."""

    subject: Subject
    attack: Attack
    ours: Number
    theirs: Published
    differs: tuple[str, ...]


def find_matches(ours: Ours, row: Published) -> Iterator[Match]:
    """Yield, for each model that the row is about, the number with the fewest differences from the paper's protocol."""
    found: dict[Any, list[Match]] = {}
    candidates = [
        ((i, own[0].key), own) for i, section in enumerate(ours.sections) for own in _accuracies(section, row)
    ]
    candidates += [((-1, own[0].key), own) for table in ours.tables for own in _recalls(table, row)]
    for key, (subject, attack, number, protocol, sizes) in candidates:
        differs = _differences(row, subject, protocol, sizes)
        match = Match(subject=subject, attack=attack, ours=number, theirs=row, differs=differs)
        found.setdefault(key, []).append(match)
    for of_one_model in found.values():
        yield min(of_one_model, key=lambda match: len(match.differs))


# A model, an attack, our number, its protocol, and the images behind it by data set
_Candidate = tuple[Subject, Attack, Number, Mapping[str, Any], list[tuple[str, int]]]


def _accuracies(section: Section, row: Published) -> Iterator[_Candidate]:
    by_name = {plain_dataset(d): d for d in section.datasets}
    names = names_here(row)
    if row.metric != "top1" or not all(d in by_name for d in names):
        return
    scorers = {"template", _scorer_of(row)}
    attacks = [attack for attack in section.attacks if same_kind(row, attack)]
    for subject in (s for s in section.subjects if s.scorer in scorers and is_about(row, s)):
        for attack in attacks:
            entries = [section.get(subject, by_name[d], attack) for d in names]
            numbers = [entry.number for entry in entries if entry is not None]
            if entries[0] and len(numbers) == len(entries):
                ours = average(numbers) if "datasets" in row.protocol else numbers[0]
                protocol = {**section.shared, **attack.settings, **entries[0].protocol}
                yield subject, attack, ours, protocol, [*zip(names, (x.n for x in numbers), strict=True)]


def names_here(row: Published) -> list[str]:
    """Return the data sets that a number is over, under the names that our results have for them."""
    suffix = COOP if row.field_protocol == "coop" else ""
    return [name + suffix if name + suffix in DATASETS else name for name in row.datasets]


def _scorer_of(row: Published) -> str:
    named = find_protocol(row.field_protocol) if row.field_protocol else {}
    return ",".join(named.get("scorer", ["template"]))


@dataclass(frozen=True, kw_only=True)
class Quoted:
    """A published robust accuracy under the same protocol as a section's.

    Attributes:
        attack, dataset: the section's; the data set may be the average.
        subject: the model there that it is of; None if the section has none.
        clean: the paper's clean accuracy of the same model.
    """

    theirs: Published
    attack: Attack
    dataset: str
    subject: Subject | None
    clean: Published | None


def quote(section: Section) -> list[Quoted]:
    """Return the published robust accuracies that stand beside a section's, or among them if nobody measured the model:
    those whose stated settings do not differ. What a paper has in several tables counts once."""
    ours, by_name = Ours(sections=[section], tables=()), {plain_dataset(d): d for d in section.datasets}
    blind = [a for a in section.attacks if a.kind == "image" and a.settings.get("aim", "ignore") == "ignore"]
    found: dict[tuple[Any, ...], Quoted] = {}
    for paper in papers():
        rows = [row for row in numbers_of(paper) if row.metric == "top1"]
        clean = {(row.place, *_model_of(row)): row for row in rows if row.attack == "clean"}
        for row in (row for row in rows if row.attack == "image"):
            names = names_here(row)
            if not all(name in by_name for name in names) or (len(names) > 1 and len(names) < len(by_name)):
                continue
            same: Sequence[tuple[Attack, Subject | None]]
            same = [(m.attack, m.subject) for m in find_matches(ours, row) if not m.differs]
            alike = (a for a in blind if same_kind(row, a) and not _differs_here(section, row, names, a))
            for attack, subject in same or [(attack, None) for attack in itertools.islice(alike, 1)]:
                quoted = Quoted(
                    theirs=row,
                    attack=attack,
                    dataset=AVERAGE if len(names) > 1 else by_name[names[0]],
                    subject=subject,
                    clean=clean.get((row.place, *_model_of(row))),
                )
                key = paper, *_model_of(row), row.value, attack, subject
                if key not in found or found[key].clean is None:
                    found[key] = quoted
    return list(found.values())


def _model_of(row: Published) -> tuple[str, ...]:
    """Return what a paper's rows of one model and data set share."""
    settings = (row.protocol.get(key, "") for key in ("model", "train_eps", "defense", "defense_steps", "defense_step"))
    return row.method, row.train_dataset, row.shots, row.dataset, *settings


def _differs_here(section: Section, row: Published, names: Sequence[str], attack: Attack) -> list[str]:
    """Return how a number's settings differ from an attack's here, on as many images as anyone was evaluated on."""
    by_name = {plain_dataset(d): d for d in section.datasets}
    subjects = [subject for subject in section.subjects if subject.scorer == _scorer_of(row)]
    entries = [(name, section.get(subject, by_name[name], attack)) for subject in subjects for name in names]
    held = {name: entry for name, entry in entries if entry is not None}
    if len(held) < len(names):
        return ["not evaluated on all of its data sets"]
    settings = {**section.shared, **attack.settings, **held[names[0]].protocol}
    return compare_settings(row, settings, [(name, entry.number.n) for name, entry in held.items()])


def _recalls(table: RecallTable, row: Published) -> Iterator[_Candidate]:
    if (
        row.recall
        and same_kind(row, table.attack)
        and plain_dataset(table.dataset).removesuffix("_captions") == row.dataset
    ):
        settings = table.attack.settings
        for subject, pairs in table.rows:
            number = recalls_of(pairs).get(row.recall)
            if number is not None and is_about(row, subject):
                yield subject, table.attack, number, settings, [(row.dataset, settings["images"])]


def is_about(row: Published, subject: Subject) -> bool:
    """Return whether a published number is of the same model: method, data, shots, training budget and defence."""
    model, defense = subject.model, subject.defense
    name = defense if "+" in defense else defense.partition(":")[0]
    if letters(name) != letters(row.defense) or model.is_mix:
        return False
    if model.method is None:
        return row.train_dataset == "none" and model.lineage is None
    shots = "full" if model.shots is None else str(model.shots)
    trained_on = plain_dataset(model.trained_on or "")
    is_same = (letters(row.method), row.shots, row.train_dataset) == (letters(_method(model)), shots, trained_on)
    return is_same and row.protocol.get("train_eps", model.train_eps) == model.train_eps


def _method(model: Model) -> str:
    """Return the method's name as papers write it: an ablation of MMCoA's losses is not MMCoA."""
    settings = model.config.get("method") or {}
    if settings.get("lambda_txt") == 0:
        return f"{model.method} (image loss only)"
    return f"{model.method} (text loss only)" if settings.get("lambda_img") == 0 else str(model.method)


def same_kind(row: Published, attack: Attack) -> bool:
    wanted = row.protocol.get("attack")
    return attack.settings["attack"] == wanted if wanted else attack.kind == row.attack


def _differences(
    row: Published, subject: Subject, ours: Mapping[str, Any], sizes: Iterable[tuple[str, int]]
) -> tuple[str, ...]:
    """Return what differs from the published protocol; `sizes` are the images behind our number, by data set."""
    found, base, theirs = [], subject.model.base, row.protocol
    if "model" in theirs and _plain_model(base) != _plain_model(theirs["model"]):
        found.append(f"model {PurePosixPath(base).name if '/' in base else base}, theirs {theirs['model']}")
    if subject.scorer != _scorer_of(row) and not row.recall:
        found.append(f"scorer {subject.scorer}, theirs {_scorer_of(row)}")
    if row.defense != "none":
        found += _defense_differences(row, subject.defense, ours)
    return (*found, *compare_settings(row, ours, sizes))


def compare_settings(row: Published, ours: Mapping[str, Any], sizes: Iterable[tuple[str, int]]) -> list[str]:
    """Return how attack, data and their settings differ, whoever the model is."""
    found, theirs = [], row.protocol
    for key, wanted in theirs.items():
        if key not in _NOT_OURS and str(ours.get(key, "none")) != wanted:
            found.append(f"{key.replace('_', ' ')} {ours.get(key, 'none')}, theirs {wanted}")
    for name, images in sizes:
        size = int(theirs["images"]) if "images" in theirs else _evaluated(name) or _evaluated(f"{name}_captions")
        if size is not None and images != size:
            found.append(f"{images:,} of the {size:,} images of {name}")
    return found


def _defense_differences(row: Published, label: str, ours: Mapping[str, Any]) -> Iterator[str]:
    """Yield how our defence and its attack differ: papers attack a model that does not know of its defence."""
    stated = {key: row.protocol[f"defense_{key}"] for key in ("steps", "step") if f"defense_{key}" in row.protocol}
    described = str(ours.get("defense", ""))
    for key, wanted in stated.items():
        own = re.search(rf"\b{key} ([^,)]+)", described)
        if own is None or own[1] != wanted:
            yield f"defence's {key} {own[1] if own else 'not stated'}, theirs {wanted}"
    changed = [s for s in label.partition(":")[2].split(",") if s and s.partition("=")[0] not in stated]
    if changed:
        yield f"defence with {', '.join(changed)}"
    aim = ours.get("aim", "ignore")
    if aim != row.protocol.get("aim", "ignore"):
        yield f"attacked through the defence ({aim}), theirs without"


def _plain_model(spec: str) -> str:
    """Return a specification under its shortest name: `ViT-B-32-quickgelu:openai` is `ViT-B-32:openai`."""
    spec = _OPENAI.get(spec, spec)
    name, colon, tag = spec.partition(":")
    return f"{name.replace('/', '-').removesuffix('-quickgelu')}{colon}{tag}"


def _evaluated(dataset: str) -> int | None:
    """Return the number of images that the papers evaluate of a data set; None if the data set is unknown."""
    known = DATASETS.get(dataset)
    return None if known is None else known.splits.get(known.evaluated)

"""The field's protocols (`--protocol`) in results: which cells follow one, and how the others differ from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rayclip.attacks import Attack, parse_attacks
from rayclip.data.registry import DATASETS
from rayclip.data.spec import COOP, parse_spec, published_name, split_resolution
from rayclip.evaluation.cell import at_budgets, described_budget
from rayclip.evaluation.plan import chosen_positions
from rayclip.models.scorers import SCORERS
from rayclip.models.zeroshot import TEMPLATE
from rayclip.names import attack_defaults, find_protocol, protocols
from rayclip.paths import plain_dataset
from rayclip.reports.notes import heading
from rayclip.reports.results import JudgedCell
from rayclip.reports.section import SHARED
from rayclip.units import parse_budgets

OWN = "own"
_FEW = 4  # differences that are listed


@dataclass(frozen=True, kw_only=True)
class FieldProtocol:
    """A protocol of the field as numbers have to follow it.

    Attributes:
        datasets: by name, `caltech101-coop` in CoOp's split.
        native: those attacked at their own resolution, the others at `resolution`.
        limit: images of each data set; None for all.
        is_drawn: whether these are a draw, and not evenly spaced.
        scorer: as results name it.
    """

    name: str
    datasets: tuple[str, ...]
    attacks: tuple[Attack, ...]
    resolution: str
    native: frozenset[str]
    resize: str
    class_names: str
    template: str
    scorer: str
    limit: int | None
    is_drawn: bool

    def settings(self, dataset: str) -> dict[str, str]:
        """Return what the cells of a data set must say."""
        native = self.resolution == "native" or published_name(dataset) in self.native
        return {
            "resolution": "native" if native else self.resolution,
            "resize": self.resize if native else "antialias",
            "class_names": self.class_names,
            "template": self.template,
        }

    def differences(self, cell: JudgedCell, classes: int) -> list[str]:
        """Return how a cell differs, as `WHAT (the protocol's)`; the defence and how it is attacked are free."""
        name, found = plain_dataset(cell.dataset), []
        if name not in self.datasets:
            found.append(f"data {name}")
        for key, wanted in self.settings(name).items():
            if (own := cell.protocol.get(key) or "curated") != wanted:
                found.append(f"{key.replace('_', ' ')} {own} ({wanted})")
        if cell.scorer != self.scorer:
            found.append(f"scorer {cell.scorer} ({self.scorer})")
        if not any(_is_attack(cell, attack, classes) for attack in self.attacks):
            found.append(f"attack {heading(cell.attack)}")
        return found + self._images(name, cell.verdicts.positions_N)

    def _images(self, name: str, positions_N: np.ndarray) -> list[str]:
        info = DATASETS.get(name)
        whole = None if info is None else info.splits.get(info.evaluated)
        wanted = min((n for n in (self.limit, whole) if n is not None), default=None)
        if wanted is not None and len(positions_N) != wanted:
            return [f"{len(positions_N):,} images ({wanted:,})"]
        if self.is_drawn and whole is not None and wanted is not None and wanted < whole:
            is_even = np.array_equal(positions_N, chosen_positions(whole, wanted))
            return ["images evenly spaced (drawn)"] * is_even
        return []


@cache
def field_protocols() -> Mapping[str, FieldProtocol]:
    """Return the field's protocols by name."""
    return {name: _read(name) for name in protocols()}


def _read(name: str) -> FieldProtocol:
    said: dict[str, Any] = {
        key: ",".join(value) if isinstance(value, list) else value
        for key, value in {"scorer": "template", "template": TEMPLATE, **find_protocol(name)}.items()
    }
    resolution, native = split_resolution(said.get("resolution", "native"))
    (scorer,) = SCORERS.parse(said["scorer"])
    attacks = parse_attacks(said["attacks"], attack_defaults(said.get("steps", 10), said.get("step_size"), "default"))
    places = [parse_spec(spec).place for spec in said["data"].split(",")]
    return FieldProtocol(
        name=name,
        datasets=tuple(place.replace("#coop", COOP) for place in places),
        attacks=tuple(at_budgets(attacks, parse_budgets([said["eps"]]))),
        resolution=resolution,
        native=frozenset(native or ()),
        resize=said.get("resize", "antialias"),
        class_names=said.get("class_names", "curated"),
        template=said["template"],
        scorer=scorer.label,
        limit=said.get("limit"),
        is_drawn=said.get("subset", "even") != "even",
    )


def _is_attack(cell: JudgedCell, attack: Attack, classes: int) -> bool:
    """Return whether a cell's attack has these settings; on a defended model every attack runs to its last step."""
    left_out = "stop" if cell.defense != "none" else ""
    return all(cell.protocol.get(key) == value for key, value in _described(attack, classes).items() if key != left_out)


@cache
def _described(attack: Attack, classes: int) -> Mapping[str, Any]:
    """Return an attack's settings on data with so many classes, as result files state them."""
    own = attack.for_classes(classes)
    return dict(json.loads(json.dumps({"attack": own.name, **described_budget(own), **own.describe()})))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells under one protocol: one of the field's, or their `own`, with its difference from the nearest one's."""

    protocol: str
    cells: Sequence[JudgedCell]
    differs: str = ""


def group_by_protocol(cells: Sequence[JudgedCell], class_names: Mapping[str, Sequence[str]]) -> list[Group]:
    """Group cells by protocol, the field's first. The other cells stand with those that share
    their settings, and with all of their models'.

    Args:
        class_names: by data fingerprint.
    """
    differing = {
        name: [protocol.differences(cell, len(class_names[cell.data_fingerprint])) for cell in cells]
        for name, protocol in field_protocols().items()
    }
    groups, followed = [], set()
    for name, found in differing.items():
        members = [cell for cell, differs in zip(cells, found, strict=True) if not differs]
        if any(cell.attack != "clean" for cell in members):
            groups.append(Group(protocol=name, cells=members))
            followed |= {cell.id for cell in members}
    own: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        own.setdefault(json.dumps({key: cell.protocol.get(key) for key in SHARED}), []).append(i)
    for indices in sorted(own.values(), key=len, reverse=True):
        left = {_subject(cells[i]) for i in indices if cells[i].id not in followed}
        chosen = [i for i in indices if _subject(cells[i]) in left]
        if chosen:
            members = [cells[i] for i in chosen]
            groups.append(Group(protocol=OWN, cells=members, differs=_nearest(differing, chosen)))
    return groups


def _subject(cell: JudgedCell) -> tuple[str, ...]:
    return cell.model.fingerprint, cell.scorer, cell.defense


def _nearest(differing: Mapping[str, Sequence[Sequence[str]]], indices: Sequence[int]) -> str:
    """Return `as tecoa, but for DIFFERENCES` of the protocol with the fewest; nothing if even these are many."""
    found = {name: list(dict.fromkeys(d for i in indices for d in each[i])) for name, each in differing.items()}
    name, fewest = min(found.items(), key=lambda item: len(item[1]))
    return f"as {name}, but for {'; '.join(fewest)}" if len(fewest) <= _FEW else ""

"""The leaderboard: every model's clean and robust accuracy under each threat model, as one static HTML page."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rayclip.evaluation.aggregate import ball_of, worst_cases
from rayclip.reports.formats import render
from rayclip.reports.grid import Cell, Grid, accuracy, number_cell
from rayclip.reports.model import Model
from rayclip.reports.notes import attack_notes, heading, shared_note
from rayclip.reports.numbers import worst_over
from rayclip.reports.section import AVERAGE, Attack, Number, Section, Subject, average, natural

_COLUMNS = tuple("model,clean,robust,n,method,trained on,defence,attacks,threat model,data set".split(","))
_KNOWN = ("architecture", "paper", "weights")  # further columns, of models that say it


class Threat(NamedTuple):
    """A threat model: what an attacker may change, and its attacks; a sample must withstand all of them."""

    name: str
    attacks: tuple[Attack, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row of the leaderboard: a model under a threat model, on a data set or on the average of all."""

    subject: Subject
    threat: Threat
    dataset: str
    clean: Number | None
    robust: Number
    attacks: tuple[str, ...]
    partial: bool


def threats(section: Section) -> list[Threat]:
    """Return the threat models, broadest first: per budget all attacks, images, both at once; then texts alone."""
    attacks = [a for a in section.attacks if a.kind != "worst"]
    texts = tuple(a for a in attacks if a.kind == "text")
    found: list[Threat] = []
    for case in worst_cases([a.settings for a in attacks]):
        if case.ball is not None:
            norm, eps = case.ball
            within = [a for a in attacks if ball_of(a.settings) == case.ball]
            images = tuple(a for a in within if a.kind == "image")
            both = tuple(a for a in within if a.kind == "multimodal")
            ball = f"{'l∞' if norm == 'linf' else 'l2'} {eps}"
            several = len([members for members in (images, texts, both) if members]) > 1
            found.append(Threat(f"{ball}, all attacks", images + texts + both if several else ()))
            found += [Threat(f"{ball}, images", images), Threat(f"{ball}, images and texts at once", both)]
    free = tuple(a for a in attacks if a.eps is None and a.kind == "image")
    found += [Threat("images, no budget", free), Threat("texts", texts)]
    return [threat for threat in found if threat.attacks]


def places(section: Section) -> Iterator[Place]:
    """Yield the rows of each threat model and data set: best robust accuracy first, those with fewer attacks last."""
    for threat in threats(section):
        for dataset in reversed(section.columns):
            found = [place for s in section.subjects if (place := _place(section, s, threat, dataset))]
            yield from sorted(found, key=lambda place: (place.partial, -place.robust.top1))


def _place(section: Section, subject: Subject, threat: Threat, dataset: str) -> Place | None:
    names = section.datasets if dataset == AVERAGE else [dataset]
    clean = section.clean
    counted = (*threat.attacks, *([clean] if clean is not None else []))
    entries = [entry for name in names if (entry := worst_over(section, subject, name, counted)) is not None]
    run = [a.label for a in threat.attacks if section.get(subject, names[0], a) is not None]
    if len(entries) < len(names) or not run:  # averages over fewer data sets are not comparable
        return None
    return Place(
        subject=subject,
        threat=threat,
        dataset=dataset,
        clean=None if clean is None else section.number(subject, dataset, clean),
        robust=average([e.number for e in entries]) if dataset == AVERAGE else entries[0].number,
        attacks=tuple(run),
        partial=any(entry.partial for entry in entries),
    )


def leaderboard(sections: Sequence[Section], title: str = "Robustness leaderboard") -> str:
    """Return the HTML page, initially filtered to the first threat model and the average (or the first data set)."""
    rows = [(place, shared_note(section)) for section in sections for place in places(section)]
    attributes = [_attributes(place, protocol) for place, protocol in rows]
    filters = ("threat", "dataset", "defense", "method", "protocol")
    held = {name: list(dict.fromkeys(row[name] for row in attributes)) for name in filters}
    datasets = dict.fromkeys(d for section in sections for d in reversed(section.columns))
    partial = any(place.partial for place, _ in rows)
    known = [[_cells(place), _known(place.subject.model)] for place, _ in rows]
    # A column of links or architectures that no model has only takes room
    held_of = [any(cell.text for cell in column) for column in zip(*(more for _, more in known), strict=True)]
    grid = Grid(
        title="Models by accuracy in %",
        header=(*_COLUMNS, *itertools.compress(_KNOWN, held_of)),
        rows=[
            (place.subject.name, [*cells, *itertools.compress(more, held_of)])
            for (place, _), (cells, more) in zip(rows, known, strict=True)
        ],
        notes=(
            "The average gives every data set the same weight, and is there for models with all of them",
            *(["† over fewer attacks than others under this threat model, and below them"] if partial else []),
        ),
    )
    return render(
        "leaderboard.html",
        title,
        models=len({place.subject.key for place, _ in rows}),
        grid=grid,
        attributes=attributes,
        threats=held["threat"],
        datasets=[name for name in datasets if name in held["dataset"]],
        defenses=sorted(held["defense"], key=natural),
        methods=sorted(held["method"], key=natural),
        protocols=held["protocol"],
        notes=[
            ". ".join([*attack_notes(section, section.attacks, section.datasets), shared_note(section)]) + "."
            for section in sections
        ],
    )


def _cells(place: Place) -> list[Cell]:
    model = place.subject.model
    shots = f"{model.shots}-shot" if model.shots else ""
    trained = " ".join(filter(None, [model.trained_on, shots])) if model.method else ""
    texts = [model.method or "none", trained or "—", place.subject.defense, ", ".join(map(heading, place.attacks))]
    return [
        accuracy(place.clean),
        accuracy(place.robust, mark="†" if place.partial else ""),
        number_cell(place.robust.n, ","),
        *(Cell(text=text) for text in (*texts, place.threat.name, place.dataset)),
    ]


def _known(model: Model) -> list[Cell]:
    links = [str(model.published.get(key, "")) for key in ("paper", "link")]
    named = zip(("paper", "checkpoint"), links, strict=True)
    return [Cell(text=model.architecture), *(Cell(text=name * bool(link), link=link) for name, link in named)]


def _attributes(place: Place, protocol: str) -> dict[str, str]:
    """Return what a row is found and filtered by."""
    subject = place.subject
    method = subject.model.method or "none"
    return {
        "id": f"{subject.name} {place.threat.name} {place.dataset} {protocol}",
        "text": " ".join([subject.name, subject.model.spec, method, subject.model.trained_on or "", subject.defense]),
        "threat": place.threat.name,
        "dataset": place.dataset,
        "defense": subject.defense,
        "method": method,
        "protocol": protocol,
    }

"""The leaderboard: every model's clean and robust accuracy under each protocol and threat model, with what papers
published of it, as one static HTML page and as JSON."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rayclip.defenses import parse_defenses
from rayclip.evaluation.aggregate import ball_of, worst_cases
from rayclip.evaluation.costs import Timing, read_timings
from rayclip.models.scorers import parse_scorers
from rayclip.names import protocols
from rayclip.reports.formats import render
from rayclip.reports.grid import Cell, Grid, accuracy, number_cell
from rayclip.reports.matching import Quoted, quote
from rayclip.reports.notes import attack_notes, heading, merge_protocols, shared_note
from rayclip.reports.numbers import make_section, worst_over
from rayclip.reports.protocols import OWN, Group, group_by_protocol
from rayclip.reports.results import Results
from rayclip.reports.section import AVERAGE, SHARED, Attack, Number, Section, Subject, average, natural
from rayclip.types import UserError

_COLUMNS = (
    "clean,robust,blind,adaptive,n,numbers,ms per image,forwards,method,trained on,defence,attacks,threat model,"
    "data set,protocol,architecture,paper,weights"
).split(",")
_ALWAYS = "clean,robust,n,method,trained on,defence,attacks,threat model,data set,protocol".split(",")
_FILTERS = ("protocol", "threat", "dataset", "defense", "method", "source")


class Threat(NamedTuple):
    """A threat model: what an attacker may change, and its attacks; a sample must withstand all of them."""

    name: str
    attacks: tuple[Attack, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a prediction: milliseconds per image, on which hardware, and forward and backward passes."""

    ms: float | None
    hardware: str
    forwards: int | None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row of the leaderboard: a model under a threat model, on a data set or on the average of all.

    Attributes:
        robust: in the worst case over all attacks that were run.
        blind, adaptive: of a defended model, over the attacks that ignore the defence, and those through it.
    """

    subject: Subject
    threat: Threat
    dataset: str
    clean: Number | None
    robust: Number
    blind: Number | None
    adaptive: Number | None
    attacks: tuple[str, ...]
    partial: bool
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the page and of the JSON file."""

    name: str
    cells: Mapping[str, Cell]
    attributes: Mapping[str, str]
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Board:
    """All numbers under one protocol: its name on the page, and how it differs from one of the field's."""

    protocol: str
    differs: str
    section: Section

    def name(self, subject: Subject) -> str:
        """Return a model's name; what scores it is part of a protocol of the field."""
        own = self.protocol.startswith(OWN)
        return subject.name if own else subject.name.replace(f", {subject.scorer}", "", 1)


def boards(results: Results) -> list[Board]:
    """Return the numbers of each protocol, the field's first."""
    groups = group_by_protocol(results.cells, results.class_names)
    names, several = results.names, sum(group.protocol == OWN for group in groups) > 1

    def make(group: Group) -> Board:
        said = {cell.dataset: {key: cell.protocol.get(key) for key in SHARED} for cell in group.cells}
        section = make_section(merge_protocols(said), group.cells, names, results.order)
        label = f"{OWN}: {shared_note(section)}" if group.protocol == OWN and several else group.protocol
        return Board(protocol=label, differs=group.differs, section=section)

    return [make(group) for group in groups]


def threats(section: Section, alone: Collection[str] = ()) -> list[Threat]:
    """Return the threat models, broadest first: per budget all attacks, images, both at once; then texts alone.

    Args:
        alone: labels of image attacks that are a threat model by themselves, too.
    """
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
            labels = list(dict.fromkeys(a.label_without_aim for a in images))
            for label in labels if len(labels) > 1 else ():
                members = tuple(a for a in images if a.label_without_aim == label)
                name = heading(label).removesuffix(eps).strip()
                found.append(Threat(f"{ball}, {name} alone", members if label in alone else ()))
    free = tuple(a for a in attacks if a.eps is None and a.kind == "image")
    found += [Threat("images, no budget", free), Threat("texts", texts)]
    return [threat for threat in found if threat.attacks]


def _place(section: Section, subject: Subject, threat: Threat, dataset: str, cost: Cost) -> Place | None:
    clean = section.clean
    names = section.datasets if dataset == AVERAGE else [dataset]
    run = [a for a in threat.attacks if section.get(subject, names[0], a) is not None]

    def over(attacks: Sequence[Attack]) -> tuple[Number, bool] | None:
        counted = (*attacks, *([clean] if clean is not None else []))
        entries = [e for name in names if attacks and (e := worst_over(section, subject, name, counted)) is not None]
        if not entries or len(entries) < len(names):  # averages over fewer data sets are not comparable
            return None
        number = average([e.number for e in entries]) if dataset == AVERAGE else entries[0].number
        return number, any(e.partial for e in entries)

    robust = over(threat.attacks) if run else None
    if robust is None:
        return None
    ignoring = [a for a in run if a.settings.get("aim", "ignore") == "ignore"]
    blind, adaptive = (
        over(attacks) if subject.defense != "none" else None
        for attacks in (ignoring, [a for a in run if a not in ignoring])
    )
    return Place(
        subject=subject,
        threat=threat,
        dataset=dataset,
        clean=None if clean is None else section.number(subject, dataset, clean),
        robust=robust[0],
        blind=blind and blind[0],
        adaptive=adaptive and adaptive[0],
        attacks=tuple(a.label for a in run),
        partial=robust[1],
        cost=cost,
    )


def _cost(section: Section, subject: Subject, dataset: str) -> Cost:
    """Return what predictions took: mean over the data sets, on the hardware that most of the images were on."""
    try:
        (scorer,), (chain,) = parse_scorers(subject.scorer), parse_defenses(subject.defense)
        forwards = scorer.cost + sum(defense.cost for defense in chain)
    except (UserError, ValueError):  # of a package that is not here
        forwards = None
    clean = section.clean
    found = {} if clean is None else section.behind(subject, dataset, clean)
    timed = [_timings(cell) for entry in found.values() for cell in entry.cells]
    samples: dict[str, int] = {}
    for each in (one for of_cell in timed for one in of_cell):
        samples[str(each.hardware)] = samples.get(str(each.hardware), 0) + each.samples
    hardware = max(samples, key=lambda name: samples[name], default="")
    means = []
    for of_cell in timed:
        there = [one for one in of_cell if str(one.hardware) == hardware]
        if there:
            means.append(1000 * sum(one.seconds for one in there) / sum(one.samples for one in there))
    whole = bool(means) and len(means) == len(timed)
    return Cost(ms=sum(means) / len(means) if whole else None, hardware=hardware * whole, forwards=forwards)


def _timings(cell: Any) -> list[Timing]:
    return [one for one in read_timings(cell.id, cell.store) if one.samples]


def rows_of(board: Board) -> Iterator[Row]:
    """Yield the rows of each threat model and data set: best robust accuracy first, those with fewer attacks last; a
    published number below the measured one that has its protocol."""
    section = board.section
    quoted = quote(section)
    cost = functools.cache(lambda subject, dataset: _cost(section, subject, dataset))
    for threat in threats(section, {q.attack.label_without_aim for q in quoted}):
        labels = {a.label for a in threat.attacks}
        alone = len({a.label_without_aim for a in threat.attacks}) == 1
        for dataset in reversed(section.columns):
            found: list[tuple[tuple[bool, float], list[Row]]] = []
            here = [q for q in quoted if alone and q.attack.label in labels and q.dataset == dataset]
            for subject in section.subjects:
                place = _place(section, subject, threat, dataset, cost(subject, dataset))
                if place is not None:
                    theirs = [_quoted_row(board, q, threat, subject) for q in here if q.subject == subject]
                    key = (place.partial, -place.robust.top1)
                    found.append((key, [_measured_row(board, place), *theirs]))
            for q in here:
                if q.subject is None:
                    found.append(((False, -q.theirs.value), [_quoted_row(board, q, threat, None)]))
            for _, rows in sorted(found, key=lambda group: group[0]):
                yield from rows


def _measured_row(board: Board, place: Place) -> Row:
    subject, cost = place.subject, place.cost
    model, published = subject.model, subject.model.published
    shots = f"{model.shots}-shot" if model.shots else ""
    trained = " ".join(filter(None, [model.trained_on, shots])) if model.method else ""
    cells = {
        "clean": accuracy(place.clean),
        "robust": accuracy(place.robust, mark="†" if place.partial else ""),
        "blind": accuracy(place.blind),
        "adaptive": accuracy(place.adaptive),
        "n": number_cell(place.robust.n, ","),
        "method": Cell(text=model.method or "none"),
        "trained on": Cell(text=trained or "—"),
        "defence": Cell(text=subject.defense),
        "attacks": Cell(text=", ".join(map(heading, place.attacks))),
        "ms per image": Cell() if cost.ms is None else Cell(text=f"{cost.ms:.3g}", value=cost.ms, note=cost.hardware),
        "forwards": Cell() if cost.forwards is None else number_cell(cost.forwards),
        "numbers": Cell(text="measured"),
        "architecture": Cell(text=model.architecture),
        "paper": _link("paper", published.get("paper")),
        "weights": _link("checkpoint", published.get("link")),
    }
    numbers = {name: getattr(place, name) for name in ("clean", "robust", "blind", "adaptive")}
    record = {
        "fingerprint": model.fingerprint,
        **{name: number.top1 for name, number in numbers.items() if number is not None},
        "robust_low": place.robust.low,
        "robust_high": place.robust.high,
        "n": place.robust.n,
        "attacks": list(place.attacks),
        **({} if cost.ms is None else {"ms": cost.ms, "hardware": cost.hardware}),
        **({} if cost.forwards is None else {"forwards": cost.forwards}),
    }
    words = [model.spec, model.trained_on or ""]
    return _row(board, board.name(subject), cells, place.threat, place.dataset, "measured", record, words)


def _quoted_row(board: Board, quoted: Quoted, threat: Threat, subject: Subject | None) -> Row:
    theirs, clean = quoted.theirs, quoted.clean
    trained = "" if theirs.train_dataset == "none" else theirs.train_dataset
    shots = f"{theirs.shots}-shot" if theirs.shots not in ("none", "full") else ""
    robust = _their_cell(theirs.value, theirs.doubt)
    is_defended = theirs.defense != "none"
    method = "none" if is_defended or not trained else theirs.method.lower()
    cells = {
        "clean": Cell() if clean is None else _their_cell(clean.value, clean.doubt),
        "robust": robust,
        "blind": robust if is_defended else Cell(),
        "adaptive": Cell(),
        "n": Cell(),
        "method": Cell(text=method if subject is None else subject.model.method or "none"),
        "trained on": Cell(text=" ".join(filter(None, [trained, shots])) or "—"),
        "defence": Cell(text=theirs.defense if subject is None else subject.defense),
        "attacks": Cell(text=heading(quoted.attack.label)),
        "ms per image": Cell(),
        "forwards": Cell(),
        "numbers": Cell(text=f"published, {theirs.place}"),
        "architecture": Cell(text=theirs.protocol.get("model", "").partition(":")[0]),
        "paper": _link("paper", theirs.link),
        "weights": Cell(),
    }
    record = {
        **({} if clean is None else {"clean": clean.value}),
        "robust": theirs.value,
        **({"blind": theirs.value} if is_defended else {}),
        "attacks": [quoted.attack.label],
        "published": theirs.place,
        **({"doubt": theirs.doubt} if theirs.doubt else {}),
    }
    name = theirs.who.removesuffix(f", {theirs.protocol.get('model')}") if subject is None else board.name(subject)
    return _row(board, name, cells, threat, quoted.dataset, "published", record, [theirs.place, theirs.who])


def _row(
    board: Board,
    name: str,
    cells: Mapping[str, Cell],
    threat: Threat,
    dataset: str,
    source: str,
    record: Mapping[str, Any],
    words: Sequence[str],
) -> Row:
    method, defense = cells["method"].text, cells["defence"].text
    protocol = ", ".join(filter(None, [board.protocol, board.differs]))
    shared = {"threat": threat.name, "dataset": dataset, "defense": defense, "method": method}
    return Row(
        name=name,
        cells={
            **cells,
            "threat model": Cell(text=threat.name),
            "data set": Cell(text=dataset),
            "protocol": Cell(text=protocol),
        },
        attributes={
            "id": " ".join([name, *words, threat.name, dataset, board.protocol]),
            "text": " ".join([name, *words, method, defense]),
            **shared,
            "protocol": board.protocol,
            "source": source,
        },
        record={"model": name, **shared, "protocol": protocol, **record},
    )


def _link(name: str, address: Any) -> Cell:
    return Cell(text=name, link=str(address)) if address else Cell()


def _their_cell(value: float, doubt: str) -> Cell:
    return Cell(text=f"{value:.1f}{'?' if doubt else ''}", value=value)


def leaderboard(
    found: Sequence[Board], rows: Sequence[Row], title: str = "Robustness leaderboard", notes: Sequence[str] = ()
) -> str:
    """Return the HTML page, initially filtered to the first protocol and threat model and the average (or the first
    data set); `notes` are remarks on the results."""
    held = {name: list(dict.fromkeys(row.attributes[name] for row in rows)) for name in _FILTERS}
    datasets = dict.fromkeys(d for board in found for d in reversed(board.section.columns))
    # A column of links, costs or architectures that no model has only takes room
    held_of = {c: any(row.cells[c].text for row in rows) for c in _COLUMNS}
    held_of["adaptive"] |= held_of["blind"]  # that nobody looked is worth a column
    shown = [c for c in _COLUMNS if c in _ALWAYS or held_of[c]]
    shown = [c for c in shown if c != "numbers" or len(held["source"]) > 1]
    marks = {
        "† over fewer attacks than others under this threat model, and below them": "†",
        "? a published number that may be wrong": "?",
    }
    texts = "".join(row.cells[c].text for row in rows for c in ("clean", "robust"))
    grid = Grid(
        title="Models by accuracy in %",
        header=("model", *shown),
        rows=[(row.name, [row.cells[c] for c in shown]) for row in rows],
        notes=(
            "The average gives every data set the same weight, and is there for models with all of them",
            *(["Milliseconds and forwards are those of a prediction"] if "forwards" in shown else []),
            *(["In italics: published numbers of the same protocol"] if "numbers" in shown else []),
            *(note for note, mark in marks.items() if mark in texts),
        ),
    )
    return render(
        "leaderboard.html",
        title,
        models=len({subject.key for board in found for subject in board.section.subjects}),
        grid=grid,
        attributes=[row.attributes for row in rows],
        defended="blind" in shown,
        protocols=held["protocol"],
        threats=held["threat"],
        datasets=[name for name in datasets if name in held["dataset"]],
        defenses=sorted(held["defense"], key=natural),
        methods=sorted(held["method"], key=natural),
        sources=held["source"],
        notes=[*(f"{note}." for note in notes), *map(_note, found)],
    )


def _note(board: Board) -> str:
    section = board.section
    own = board.protocol.startswith(OWN)
    begins = board.differs if own else f"{board.protocol}: {protocols()[board.protocol]['about'].rstrip('.')}"
    said = [begins, *attack_notes(section, section.attacks, section.datasets), shared_note(section)]
    return ". ".join(filter(None, said)) + "."

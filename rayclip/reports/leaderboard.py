"""The leaderboard: every model's clean and robust accuracy under each threat model, as one static HTML page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rayclip.evaluation.aggregate import worst_cases
from rayclip.reports.build import attack_notes, said
from rayclip.reports.document import Cell, accuracy
from rayclip.reports.numbers import AVERAGE, Attack, Entry, Number, Section, Subject, average, worst_over
from rayclip.reports.page import shell, sortable, table
from rayclip.reports.results import natural
from rayclip.reports.table import heading

_COLUMNS = "model,clean,robust,n,method,trained on,defence,attacks,threat model,data set".split(",")


@dataclass(frozen=True, kw_only=True)
class Threat:
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
    texts = tuple(a for a in section.attacks if a.kind == "text")
    found: list[Threat] = []
    for case in worst_cases([a.settings for a in attacks]):
        if case.ball is None:
            continue
        norm, eps = case.ball
        within = [a for a in attacks if a.ball == case.ball]
        images = tuple(a for a in within if a.kind == "image")
        both = tuple(a for a in within if a.kind == "multimodal")
        ball = f"{'l∞' if norm == 'linf' else 'l2'} {eps}"
        kinds = [(f"{ball}, images", images), (f"{ball}, images and texts at once", both)]
        if len([members for members in (images, texts, both) if members]) > 1:
            found.append(Threat(name=f"{ball}, all attacks", attacks=images + texts + both))
        found += [Threat(name=name, attacks=members) for name, members in kinds if members]
    free = tuple(a for a in section.attacks if a.eps is None and a.kind == "image")
    found += [Threat(name="images, no budget", attacks=free)] if free else []
    return found + ([Threat(name="texts", attacks=texts)] if texts else [])


def places(section: Section) -> Iterator[Place]:
    """Yield the rows of each threat model and data set: best robust accuracy first, those with fewer attacks last."""
    clean = next((a for a in section.attacks if a.kind == "clean"), None)
    for threat in threats(section):
        for dataset in reversed(section.columns):
            found = [place for s in section.subjects if (place := _place(section, s, threat, dataset, clean))]
            yield from sorted(found, key=lambda place: (place.partial, -place.robust.top1))


def _place(section: Section, subject: Subject, threat: Threat, dataset: str, clean: Attack | None) -> Place | None:
    names = section.datasets if dataset == AVERAGE else [dataset]
    counted = (*threat.attacks, *([clean] if clean is not None else []))
    entries = [worst_over(section, subject, name, counted) for name in names]
    present: list[Entry] = [entry for entry in entries if entry is not None]
    if len(present) < len(names):  # averages over fewer data sets are not comparable
        return None
    run = [a.label for a in threat.attacks if section.get(subject, names[0], a) is not None]
    if not run:
        return None
    return Place(
        subject=subject,
        threat=threat,
        dataset=dataset,
        clean=None if clean is None else section.number(subject, dataset, clean),
        robust=average([e.number for e in present]) if dataset == AVERAGE else present[0].number,
        attacks=tuple(run),
        partial=any(entry.partial for entry in present),
    )


def leaderboard(sections: Sequence[Section], title: str = "Robustness leaderboard") -> str:
    """Return the HTML page, initially filtered to the first threat model and the average (or the first data set)."""
    rows = [(i, place) for i, section in enumerate(sections) for place in places(section)]
    protocols = [said(section.shared) for section in sections]
    head = '<th scope="col">#</th>' + sortable(_COLUMNS, (c for c in _COLUMNS if c not in ("clean", "robust", "n")))
    body = "".join(_row(place, protocols[i]) for i, place in rows)
    held = {place.dataset for _, place in rows}
    datasets = [d for d in dict.fromkeys(d for s in sections for d in reversed(s.columns)) if d in held]
    filters = [
        ("threat", "Threat model", list(dict.fromkeys(p.threat.name for _, p in rows)), False),
        ("dataset", "Data set", datasets, False),
        ("defense", "Defence", _sorted(p.subject.defense for _, p in rows), True),
        ("method", "Method", _sorted(p.subject.model.method or "none" for _, p in rows), True),
        *([("protocol", "Protocol", protocols, False)] if len(protocols) > 1 else []),
    ]
    controls = "".join(_select(*choice) for choice in filters)
    models = len({p.subject.key for _, p in rows})
    partial = (
        " † over fewer attacks than others under this threat model, and below them."
        if any(p.partial for _, p in rows)
        else ""
    )
    notes = "".join(
        f"<li>{escape('. '.join([*attack_notes(section, section.attacks), said(section.shared)]))}.</li>"
        for section in sections
    )
    return shell(
        title,
        header=f"<p>{models} models. Robust: percent of samples that are right before and after every attack of the "
        "threat model; intervals are 95 %.</p>",
        main=f'<form class="controls" role="search" aria-label="Leaderboard">'
        f'<label>Find a model<input id="search" type="search" autocomplete="off"></label>{controls}'
        '<p role="status" id="count" data-of="rows"></p></form>'
        + table("board", "Models by accuracy in %", head, body, "data-rows")
        + f'<p class="notes">The average gives every data set the same weight, and is there for models with all of '
        f'them.{partial} The numbers are also in <a href="leaderboard.csv">leaderboard.csv</a>.</p>'
        f'<section aria-labelledby="protocols"><h2 id="protocols">Protocol</h2><ul>{notes}</ul></section>',
    )


def _sorted(names: "Iterator[str]") -> list[str]:
    return sorted(dict.fromkeys(names), key=natural)


def _select(name: str, label: str, values: Sequence[str], everything: bool) -> str:
    options = '<option value="">all</option>' if everything else ""
    options += "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    one = "" if everything else " data-one"
    return f'<label>{label}<select data-filter="{name}"{one}>{options}</select></label>'


def _row(place: Place, protocol: str) -> str:
    model = place.subject.model
    trained = (
        " ".join(filter(None, [model.trained_on, f"{model.shots}-shot" if model.shots else ""])) if model.method else ""
    )
    texts = [model.method or "none", trained or "—", place.subject.defense]
    attributes = {
        "id": f"{place.subject.name} {place.threat.name} {place.dataset} {protocol}",
        "text": " ".join([place.subject.name, model.spec, *texts]),
        "threat": place.threat.name,
        "dataset": place.dataset,
        "defense": place.subject.defense,
        "method": texts[0],
        "protocol": protocol,
    }
    spelled = "".join(f' data-{key}="{escape(value)}"' for key, value in attributes.items())
    numbers = _cell(accuracy(place.clean)) + _cell(accuracy(place.robust, mark="†" if place.partial else ""))
    return (
        f'<tr{spelled}><td data-rank></td><th scope="row" class="text">{escape(place.subject.name)}</th>'
        + numbers
        + f'<td data-value="{place.robust.n}">{place.robust.n:,}</td>'
        + "".join(f'<td class="text">{escape(text)}</td>' for text in texts)
        + f'<td class="text long">{escape(", ".join(map(heading, place.attacks)))}</td>'
        + "".join(f'<td class="text">{escape(text)}</td>' for text in (place.threat.name, place.dataset))
        + "</tr>"
    )


def _cell(cell: Cell) -> str:
    value = "" if cell.value is None else f"{cell.value:.6g}"
    return f'<td data-value="{value}">{escape(cell.text)} <span class="ci">{escape(cell.note)}</span></td>'

"""Compare our numbers with published ones: a table of a paper, a method in all papers, or everything there is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayclip.reports.formats import number_line
from rayclip.reports.grid import Cell, Grid, Part, accuracy, format_signed, number_cell
from rayclip.reports.matching import Match, Ours, find_matches, is_about, same_kind
from rayclip.reports.notes import heading
from rayclip.reports.published import Published, letters, numbers_of, papers, sources
from rayclip.reports.recalls import RecallTable
from rayclip.reports.section import Section
from rayclip.types import UserError

EVERYTHING = "all"


def compare_with_published(
    sections: Sequence[Section], wanted: Sequence[str], tables: Sequence[RecallTable] = ()
) -> list[Part]:
    """Return parts of the report that compare with published numbers.

    Args:
        sections: our accuracies.
        wanted: `PAPER:TABLE`; `PAPER`, every table of it; a method or a defence (`ttc`), as all papers measured it;
            `all`, every number that there is.
        tables: our recalls.

    Raises:
        UserError: there is no such paper, table or method.
    """
    ours = Ours(sections=sections, tables=tables)
    return [part for choice in wanted for part in _compare(ours, choice)]


def _compare(ours: Ours, choice: str) -> Iterator[Part]:
    if choice == EVERYTHING:
        yield from _everything(ours, [row for paper in papers() for row in numbers_of(paper)])
        return
    paper, _, table = choice.partition(":")
    if paper not in papers():
        rows = [row for name in papers() for row in numbers_of(name) if _is_of(row, choice)]
        if not rows:
            raise UserError(
                f"--against '{choice}': there is no paper '{paper}' and no such method; write all, a method such as "
                f"ttc, or PAPER:TABLE, of {', '.join(papers())}."
            )
        yield _side_by_side(ours, choice, rows)
        return
    by_table: dict[str, list[Published]] = {}
    for row in numbers_of(paper):
        by_table.setdefault(row.table, []).append(row)
    if table and table not in by_table:
        raise UserError(f"--against '{choice}': {paper} has no table {table}, only {', '.join(by_table)}.")
    for name in [table] if table else by_table:
        yield _part(ours, paper, name, by_table[name])


def _is_of(row: Published, method: str) -> bool:
    return bool(letters(method)) and letters(method) in (letters(row.method), letters(row.protocol.get("defense", "")))


def _part(ours: Ours, paper: str, table: str, rows: Sequence[Published]) -> Part:
    found = [match for row in rows for match in find_matches(ours, row)]
    title = f"Beside {paper}, table {table}"
    if not found:
        return Part(title=title, text=(_why_nothing(ours, rows),))
    alike = sum(not match.differs for match in found)
    note = f"The protocol matches in {alike} of {len(found)} numbers; there the difference is ours minus theirs"
    grid = _match_grid(f"ours and those of {paper}, table {table}", found, note)
    return Part(title=title, grids=(grid,), lines=[_line(match) for match in found])


def _everything(ours: Ours, rows: Sequence[Published]) -> Iterator[Part]:
    """Yield the numbers with a protocol match and their difference, and all others with the reason."""
    alike: list[Match] = []
    others: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        found = list(find_matches(ours, row))
        same = [match for match in found if not match.differs]
        alike += same
        if not same:
            nearest = min(found, key=lambda match: len(match.differs), default=None)
            why = _why_not(ours, row) if nearest is None else "; ".join(nearest.differs)
            others.setdefault((row.place, row.who, row.under, why), []).append(row.dataset)
    count = len({id(match.theirs) for match in alike})
    title = "Beside every published number"
    text = f"Of {len(rows):,} published numbers, {count:,} have the same protocol as a number here."
    grids = [_match_grid("ours and theirs, under the same protocol", alike, "Difference: ours minus theirs")]
    yield Part(title=title, text=(text,), grids=grids if alike else (), lines=[_line(match) for match in alike])
    cells = [
        (place, [*map(_text, (who, under, ", ".join(datasets))), number_cell(len(datasets)), _text(why)])
        for (place, who, under, why), datasets in others.items()
    ]
    header = ("paper", "published", "attack", "data sets", "numbers", "why not")
    grid = Grid(title="published numbers without a match", header=header, rows=cells, notes=_source_notes(rows))
    yield Part(title="Published numbers without a match here", grids=(grid,), reference=True)


def _text(text: str) -> Cell:
    return Cell(text=text)


def _source_notes(rows: Sequence[Published]) -> list[str]:
    known = {name: sources()[name] for name in dict.fromkeys(row.paper for row in rows) if name in sources()}
    return [f"{name}: {about['source']} ({about['has']})" for name, about in known.items()]


def _side_by_side(ours: Ours, method: str, rows: Sequence[Published]) -> Part:
    """Return a method's numbers with a column per table of a paper: a row per data set and protocol."""
    names = list(dict.fromkeys(row.place for row in rows))
    keys = ("model", "train_eps", "defense_steps", "defense_step", "attack", "eps", "steps", "iterations")
    lines: dict[tuple[str, ...], dict[str, Published]] = {}
    for row in rows:
        protocol = [row.protocol.get(key, "") for key in keys]
        lines.setdefault((row.dataset, row.train_dataset, *protocol), {})[row.place] = row
    many = sorted(lines.items(), key=lambda line: (-len(line[1]), line[0]))
    matched = {id(row): [m for m in find_matches(ours, row) if not m.differs] for row in rows}
    cells = []
    for (dataset, *_), by_place in many:
        first = next(iter(by_place.values()))
        mine = next((m for row in by_place.values() for m in matched[id(row)]), None)
        theirs = [_their_cell(by_place[name]) if name in by_place else Cell() for name in names]
        about = [_text(first.who), _text(first.under), *([accuracy(mine.ours)] if mine else [Cell()])]
        cells.append((dataset, [*about, *theirs]))
    grid = Grid(
        title=f"{method} as {len({row.paper for row in rows})} papers measured it: accuracy in %",
        header=("data set", "model", "attack", "ours", *names),
        rows=cells,
        notes=(
            "Ours: under the same protocol as one of the papers'; settings that a paper does not state may differ",
            *_doubts(rows),
            *_source_notes(rows),
        ),
    )
    found = [match for matches in matched.values() for match in matches]
    return Part(title=f"Published: {method}", grids=(grid,), lines=[_line(match) for match in found])


def _match_grid(title: str, found: Sequence[Match], note: str) -> Grid:
    differences = list(dict.fromkeys(what for match in found for what in match.differs))
    measures = sorted({"recall" if match.theirs.recall else "accuracy" for match in found})
    several = len({match.theirs.place for match in found}) > 1
    return Grid(
        title=f"{title}: {' and '.join(measures)} in %",
        header=(
            *("model", "data set", "attack", "ours", "theirs", "difference"),
            *(("paper",) if several else ("differs",)),
        ),
        rows=[
            (
                match.subject.name,
                [*_cells(match), _text(match.theirs.place if several else _numbered(match, differences))],
            )
            for match in found
        ],
        notes=(
            note,
            *(f"{i}: {what}" for i, what in enumerate(differences, 1)),
            *_doubts([match.theirs for match in found]),
        ),
    )


def _numbered(match: Match, differences: Sequence[str]) -> str:
    return " ".join(str(i) for i, what in enumerate(differences, 1) if what in match.differs)


def _doubts(rows: Sequence[Published]) -> list[str]:
    found = dict.fromkeys(f"{row.paper}, {row.doubt}" for row in rows if row.doubt)
    return [f"? doubtful: {'; '.join(found)}"] if found else []


def _their_cell(row: Published) -> Cell:
    return Cell(text=f"{row.value:.2f}{'?' if row.doubt else ''}", value=row.value)


def _cells(match: Match) -> list[Cell]:
    recall = match.theirs.recall
    metric = f", {recall[0].upper()}@{recall[1]}" if recall else ""
    gap = match.ours.top1 - match.theirs.value
    return [
        Cell(text=match.theirs.dataset),
        Cell(text=f"{heading(match.attack.label)}{metric}"),
        accuracy(match.ours),
        _their_cell(match.theirs),
        Cell() if match.differs else Cell(text=format_signed(gap), value=gap),
    ]


def _line(match: Match) -> Mapping[str, Any]:
    """Return a comparison as a line of CSV."""
    ours, theirs = match.ours, match.theirs
    return {
        **number_line(match.subject, theirs.dataset, match.attack, ours, theirs.metric if theirs.recall else ""),
        "beside": theirs.place,
        "theirs": theirs.value,
        "difference": "" if match.differs else f"{ours.top1 - theirs.value:.4f}",
        "differs": "; ".join(match.differs),
        "doubt": theirs.doubt,
    }


def _why_not(ours: Ours, row: Published) -> str:
    """Return why no number of ours stands beside a published one."""
    missing = [name for name in row.datasets if name not in ours.datasets]
    if row.datasets == ("average",):
        return "its data sets are not stated"
    if missing:
        some = f"{len(missing)} of its {len(row.datasets)} data sets" if len(row.datasets) > 1 else "these data"
        return f"no results on {some}"
    if not any(is_about(row, subject) for subject in ours.subjects):
        return "no such model here" if row.defense == "none" else f"no untouched model behind {row.defense} here"
    tried = any(
        section.get(subject, dataset, attack) is not None
        for section in ours.sections
        for attack in section.attacks
        for subject in section.subjects
        for dataset in section.datasets
        if same_kind(row, attack) and is_about(row, subject)
    )
    if not (tried or row.recall):
        return "not evaluated under this attack"
    return "this model was not evaluated so on these data"


def _why_nothing(ours: Ours, rows: Sequence[Published]) -> str:
    theirs = sorted({d for row in rows for d in row.datasets})
    if not ours.datasets & set(theirs):
        about = ", ".join(sorted(ours.datasets))
        return f"Nothing to compare: the table is about {', '.join(theirs)}, these results about {about}."
    kinds = sorted({f"{r.method} ({r.train_dataset}, {r.shots})" for r in rows if r.train_dataset != "none"})
    defended = sorted({r.method for r in rows if r.defense != "none"})
    has = ["the untouched model", *kinds, *(f"{name} (a defence)" for name in defended)]
    return f"Nothing to compare: no model here is one of the table's. It has {', '.join(has)}."

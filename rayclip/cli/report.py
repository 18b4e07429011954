"""`rayclip report` and `rayclip leaderboard`: readable tables, figures and pages from result folders."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayclip import terminal
from rayclip.cli.command import MODELS
from rayclip.cli.options import split, split_models, write_file
from rayclip.paths import check_file, check_folder
from rayclip.types import UserError

if TYPE_CHECKING:  # keeps `--help` fast
    from rayclip.progress import Display
    from rayclip.reports.results import Results

_PLACES = "Folders or URIs that rayclip eval, retrieval, interpolate or a sweep has written, or ids of MLflow runs."
Places = Annotated[list[str], typer.Argument(metavar="DIR_OR_RUN...", help=_PLACES)]
_ADD = (
    "Evaluate this checkpoint as the models of the first DIR were (data, attacks, budgets), and append it; the "
    f"verdicts stay in --out, and later boards there have it too. Repeat for several. {MODELS}"
)
Format = Literal["md", "html", "tex", "csv", "json"]


def report(
    places: Places,
    form: Annotated[Format | None, typer.Option("--format")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    against: Annotated[Sequence[str], typer.Option(metavar="PAPER:TABLE|METHOD|all")] = (),
    baseline: Annotated[str | None, typer.Option(metavar="MODEL")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR")] = None,
    calibration: bool = False,
    tracking_uri: str | None = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Make tables and figures from result files: accuracies with intervals, averages, worst cases, McNemar's test.

    Args:
        form: [default: what --out ends in, else md]
        out: [default: -, standard output]
        against: Published numbers beside ours: doc:1,tgazsr:3, or repeat; a paper alone is all its tables, a method
            (ttc) all papers that measured it, and all every published number, or why it has no match here.
        baseline: Compare the others with this one (McNemar). [default: the best]
        figures: Write the figures there, as SVG, PDF and PNG; html has them inside anyway.
        calibration: Also how far confidence is from accuracy (expected calibration error), with reliability diagrams.
    """
    out = None if out == Path("-") else out
    form = form or _form(out)
    if out is not None:
        check_file("--out", out, example=f"report.{form}")
    if figures is not None:
        check_folder("--figures", str(figures))

    from rayclip.reports import make_report

    results = _read(places, tracking_uri, quiet=quiet)
    with _display(quiet) as display:
        text = make_report(
            results,
            form,
            against=split(against),
            baseline=baseline,
            calibration=calibration,
            figures=figures,
            beside=out.absolute().parent if out is not None else Path.cwd(),
            tell=lambda figure, done, total: display.update(f"drawing {figure}", done, total),
        )
    if out is None:
        terminal.write_document(text, declares_utf8=form in ("html", "tex"))
        return
    write_file(out, text)
    print(f"report: {out}")


def leaderboard(
    places: Places,
    out: Annotated[Path, typer.Option(metavar="DIR")],
    add: Annotated[Sequence[str], typer.Option(metavar="MODEL", help=_ADD)] = (),
    title: str = "Robustness leaderboard",
    cluster: bool = False,
    tracking_uri: str | None = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Collect results in a page to sort and filter: a row per model, threat model, defence and data set.

    To add an external checkpoint: rayclip leaderboard DIR --out BOARD --add local-dir:CHECKPOINT

    Args:
        out: Folder of the page, index.html, of its numbers as CSV and JSON, and of what --add finds.
        title: Of the page.
    """
    check_folder("--out", str(out))

    from rayclip.reports import make_leaderboard
    from rayclip.store import Store

    own = str(out / "results")
    if add:
        from rayclip import api
        from rayclip.api import checks

        first = _read(places[:1], tracking_uri, quiet=quiet)
        known = _read(places, tracking_uri, quiet=quiet) if len(places) > 1 else first
        models = {model: model for model in split_models(add)}
        where = api.Where(out=own, cluster=cluster, quiet=quiet)
        api.compare("leaderboard", models, checks.evaluations_of(first), where, known.cells)
    folders = [*places, *([own] if (out / "results" / "cells").is_dir() and own not in places else [])]
    store = Store(str(out))
    for name, text in make_leaderboard(_read(folders, tracking_uri, quiet=quiet), title).items():
        store.write(name, text.encode())
    print(f"leaderboard: {out / 'index.html'}")


_ENDINGS: dict[str, Format] = {"": "md", ".md": "md", ".html": "html", ".htm": "html", ".tex": "tex"}
_ENDINGS |= {".csv": "csv", ".json": "json"}


def _form(out: Path | None) -> Format:
    ending = "" if out is None else out.suffix.lower()
    if ending not in _ENDINGS:
        raise UserError(f"--out {out}: a report ends in .md, .html, .tex, .csv or .json; or name its --format.")
    return _ENDINGS[ending]


def _read(places: list[str], tracking_uri: str | None, *, quiet: bool) -> "Results":
    from rayclip.reports.results import read_results
    from rayclip.tracking.experiment import is_run, results_of
    from rayclip.tracking.journal import logged_runs

    chosen: dict[str, set[str] | None] = {}  # models to read by folder, None for all
    for place in places:
        folder, model = results_of(place, tracking_uri) if is_run(place) and not Path(place).exists() else (place, None)
        before = chosen.setdefault(folder, set())
        chosen[folder] = None if model is None or before is None else before | {model}
    only = {folder: models for folder, models in chosen.items() if models is not None}
    with _display(quiet) as display:
        return read_results(list(chosen), functools.partial(display.update, "reading cells"), only, logged_runs)


def _display(quiet: bool) -> "Display":
    from rayclip.progress import Display

    return Display(quiet=quiet or not sys.stderr.isatty())

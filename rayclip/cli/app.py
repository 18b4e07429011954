"""The command line `rayclip`: parse options, make one call, print a table. Heavy imports are inside the commands."""

from collections.abc import Mapping
from typing import Annotated

import typer

from rayclip.cli import captions, data, doctor, evaluate, models, plan, report, retrieval, train
from rayclip.cli.options import Tracking

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Adversarial fine-tuning and attack of CLIP, carried over a cluster by Ray.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from rayclip import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def attacks() -> None:
    """List the attacks for `rayclip eval --attacks`, with their settings and defaults."""
    from rayclip.attacks.registry import about, known_attacks

    _list_kinds("attack", {name: (about(name, kind), kind) for name, kind in known_attacks().items()})
    print("\nwritten as NAME:KEY=VALUE, commas between: --attacks clean,pgd:steps=100,step=1/255,autoattack")


@app.command()
def defenses() -> None:
    """List the defences for `rayclip eval --defense`, with their settings and defaults."""
    from rayclip.defenses.registry import about, known_defenses

    _list_kinds("defence", {name: (about(name, kind), kind) for name, kind in known_defenses().items()})
    print("\nwritten as NAME:KEY=VALUE, commas between, + for chains: --defense none,ttc:eps=4/255,steps=2,rn+tte")


def _list_kinds(what: str, kinds: Mapping[str, tuple[str, type]]) -> None:
    """Print names with descriptions and settings."""
    from rich.table import Table

    from rayclip import terminal
    from rayclip.settings import shown_defaults

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(what, no_wrap=True)
    table.add_column("what it does, and its settings")
    for name, (about, kind) in kinds.items():
        settings = " ".join(f"{k}={v}" for k, v in shown_defaults(kind).items())
        table.add_row(name, about + (f"  [{settings}]" if settings else ""))
    terminal.console().print(table)


@app.command()
def ui(
    experiment: Annotated[
        str | None, typer.Option(help="Open this experiment's runs.  [default: all experiments]")
    ] = None,
    tracking_uri: Tracking = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Start the MLflow UI on this machine and open it at an experiment's runs; Ctrl-C ends it."""
    from rayclip.tracking.ui import serve

    serve(tracking_uri, experiment, port=port, browser=browser)


app.command("eval")(evaluate.evaluate)
app.command()(train.train)
app.command()(plan.plan)
app.command()(retrieval.retrieval)
app.command()(report.report)
app.command()(report.leaderboard)
app.command("import")(models.import_)
app.command()(doctor.doctor)
app.command()(models.interpolate)
app.add_typer(data.app, name="data")
app.add_typer(captions.app, name="captions")

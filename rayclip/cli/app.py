"""The command line `rayclip`: parse options, make one call, print a table. Heavy imports are inside the commands."""

from collections.abc import Callable
from typing import Annotated

import typer

from rayclip.cli import bench, captions, data, doctor, evaluate, lists, log, models, plan, report, retrieval, train
from rayclip.cli.help import WIDTH, Command, Group
from rayclip.cli.options import Tracking
from rayclip.cli.request import with_request

app = typer.Typer(
    cls=Group,
    context_settings=WIDTH,
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


def ui(
    experiment: Annotated[
        str | None, typer.Option(help="Open this experiment's runs.  [default: all experiments]")
    ] = None,
    tracking_uri: Tracking = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Start the MLflow UI on this machine and open it at an experiment's runs; Ctrl-C ends it."""
    from rayclip.tracking.views import serve

    serve(tracking_uri, experiment, port=port, browser=browser)


_COMMANDS: dict[str, Callable[..., None]] = {
    "eval": evaluate.evaluate,
    "train": train.train,
    "report": report.report,
    "leaderboard": report.leaderboard,
    "log": log.log,
    "plan": plan.plan,
    "retrieval": retrieval.retrieval,
    "interpolate": with_request(models.interpolate, ("origin", "target"), experiment="rayclip-interpolate"),
    "import": models.import_,
    "attacks": lists.attacks,
    "methods": lists.methods,
    "defenses": lists.defenses,
    "scorers": lists.scorers,
    "ui": ui,
    "bench": bench.bench,
    "doctor": doctor.doctor,
}
for name, command in _COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(data.app, name="data")
app.add_typer(captions.app, name="captions")

"""The command line `rayclip`: parse options, make one call, print a table. Heavy imports are inside the commands."""

from typing import Annotated

import typer

from rayclip.cli import captions, data, doctor, evaluate, lists, log, models, plan, report, retrieval, train
from rayclip.cli.command import add_command, command_group

app = command_group("Adversarial fine-tuning and attack of CLIP, carried over a cluster by Ray.")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from rayclip import __version__

        print(__version__)
        raise typer.Exit


def ui(
    experiment: str | None = None,
    tracking_uri: str | None = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    browser: bool = True,
) -> None:
    """Start the MLflow UI on this machine and open it at an experiment's runs; Ctrl-C ends it.

    Args:
        experiment: Open this experiment's runs. [default: all experiments]
        browser: Open a browser.
    """
    from rayclip.tracking.views import serve

    serve(tracking_uri, experiment, port=port, browser=browser)


add_command(app, "eval", evaluate.evaluate, experiment="rayclip-eval")
add_command(app, "train", train.train, experiment="rayclip-train")
add_command(app, "report", report.report)
add_command(app, "leaderboard", report.leaderboard)
add_command(app, "log", log.log)
add_command(app, "plan", plan.plan, experiment="rayclip-eval")
add_command(app, "retrieval", retrieval.retrieval, experiment="rayclip-retrieval")
add_command(app, "interpolate", models.interpolate, experiment="rayclip-interpolate")
add_command(app, "import", models.import_)
for listing in (lists.attacks, lists.methods, lists.defenses, lists.scorers):
    add_command(app, listing.__name__, listing)
add_command(app, "ui", ui)
add_command(app, "doctor", doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(captions.app, name="captions")

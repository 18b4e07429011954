"""The command line `rayclip`: parse options, make one call, print a table. Heavy imports are inside the commands."""

from typing import Annotated

import typer

from rayclip.cli import bench, captions, data, doctor, evaluate, grid, lists, models, report, train
from rayclip.cli.command import add_command, command_group
from rayclip.cli.options import check_tracking

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


def log(
    results: Annotated[list[str], typer.Argument(metavar="RESULTS...")],
    tracking_uri: str | None = None,
    experiment: str | None = None,
) -> None:
    """Log finished or running work to an MLflow that has not seen it, or only a part; twice is once.

    Example: rayclip log runs/mmcoa_shots-digits --tracking-uri http://HOST:5000

    Args:
        results: Folders or URIs that rayclip train, eval, retrieval, interpolate or a sweep has written.
        experiment: MLflow experiment. [default: the one that the commands named]
    """
    check_tracking(tracking_uri)

    from rayclip.tracking.address import default_uri
    from rayclip.tracking.deliverer import deliver_results

    uri = tracking_uri or default_uri()
    for place in results:
        for done in deliver_results(place, uri, experiment):
            refused = f", {done.refused} events refused (see journal/ there)" if done.refused else ""
            runs = f"{done.runs} run{'s' if done.runs != 1 else ''}"
            print(f"{done.results}: {runs} in experiment '{done.experiment}' at {uri}{refused}")


add_command(app, "eval", evaluate.evaluate, experiment="rayclip-eval")
add_command(app, "train", train.train, experiment="rayclip-train")
grid.add_to(app)
add_command(app, "report", report.report)
add_command(app, "leaderboard", report.leaderboard)
add_command(app, "log", log)
add_command(app, "plan", evaluate.plan, experiment="rayclip-eval")
add_command(app, "retrieval", evaluate.retrieval, experiment="rayclip-retrieval")
add_command(app, "interpolate", models.interpolate, experiment="rayclip-interpolate")
add_command(app, "import", models.import_)
add_command(app, "export", models.export)
add_command(app, "uap", models.uap)
for listing in (lists.attacks, lists.methods, lists.defenses, lists.scorers):
    add_command(app, listing.__name__, listing)
add_command(app, "ui", ui)
add_command(app, "bench", bench.bench)
add_command(app, "doctor", doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(captions.app, name="captions")

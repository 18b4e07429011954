"""`rayclip log`: deliver the journals of result folders to an MLflow server, during or after their command."""

from typing import Annotated

import typer

from rayclip.cli.options import Tracking, check_tracking


def log(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULTS...",
            help="Folders or URIs that rayclip train, eval, retrieval, interpolate or a sweep has written.",
        ),
    ],
    tracking_uri: Tracking = None,
    experiment: Annotated[
        str | None, typer.Option(help="MLflow experiment.  [default: the one that the commands named]")
    ] = None,
) -> None:
    """Log finished or running work to an MLflow that has not seen it, or only a part; twice is once.

    Example: rayclip log runs/mmcoa_shots-digits --tracking-uri http://HOST:5000
    """
    check_tracking(tracking_uri, no_tracking=False)

    from rayclip.tracking.address import default_uri
    from rayclip.tracking.deliverer import deliver_results

    uri = tracking_uri or default_uri()
    for place in results:
        for done in deliver_results(place, uri, experiment):
            refused = f", {done.refused} events refused (see journal/ there)" if done.refused else ""
            runs = f"{done.runs} run{'s' if done.runs != 1 else ''}"
            print(f"{done.results}: {runs} in experiment '{done.experiment}' at {uri}{refused}")

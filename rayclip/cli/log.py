"""`rayclip log`: deliver the journals of result folders to an MLflow server, during or after their command."""

from typing import Annotated

import typer

from rayclip.cli.options import check_tracking


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

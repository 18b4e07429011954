"""Find the result files behind a run in MLflow."""

import re

from rayclip.tracking.address import default_uri
from rayclip.tracking.experiment import connected
from rayclip.types import UserError

RESULTS, MODEL = "rayclip.results", "rayclip.model"  # tags: folder of the results; fingerprint of the model


def is_run(text: str) -> bool:
    """Return whether a text is a run id, with or without `runs:/`."""
    return re.fullmatch(r"(runs:/)?[0-9a-f]{32}", text) is not None


def results_of(run: str, uri: str | None) -> tuple[str, str | None]:
    """Return the folder of a run's results, and the fingerprint of its model (None for all). Raise a `UserError` if
    unknown.
    """
    from mlflow.exceptions import MlflowException

    where = uri or default_uri()
    with connected(where) as client:
        try:
            tags = client.get_run(run.removeprefix("runs:/")).data.tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"there is no run '{run}' at {where}: give --tracking-uri, or the folder of results."
            ) from error
    if RESULTS not in tags:
        raise UserError(f"run '{run}' does not say where its results lie: give the folder instead.")
    return tags[RESULTS], tags.get(MODEL)

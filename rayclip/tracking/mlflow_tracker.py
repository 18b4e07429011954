"""Runs in MLflow, through its client and explicit run ids: nothing depends on a process's active run."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayclip import __version__
from rayclip.types import UserError

# MLflow's limits on one request
_METRICS_AT_ONCE = 1000
_PARAMS_AT_ONCE = 100


def default_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def quiet_client(uri: str) -> Any:
    """MLflow's client, without the narration of its database migrations."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


class MlflowTracker:
    """An experiment to log to; see `types.Tracker` for the methods. Picklable: it holds names, not connections.

    Raises:
        UserError: the store cannot be reached.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
        self.uri, self.experiment = uri, experiment
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # for the first contact; a dead server shows soon
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for our tables
        from mlflow.exceptions import MlflowException

        try:
            client = self._client()
            found = client.get_experiment_by_name(experiment)
            self.experiment_id = (
                found.experiment_id
                if found
                else client.create_experiment(experiment, artifact_location=self._artifact_location())
            )
        except (MlflowException, OSError) as error:
            raise UserError(
                f"MLflow at '{uri}' cannot be reached: start it, or give another --tracking-uri "
                f"({str(error).splitlines()[0][:160]})."
            ) from error

    @property
    def address(self) -> str:
        return f"{self.uri} {self.experiment}"

    def _artifact_location(self) -> str | None:
        """Beside an SQLite file, whatever directory a worker runs in; a server decides for itself."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlruns").as_uri()

    def _client(self) -> Any:
        return quiet_client(self.uri)

    def start(
        self,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        from mlflow.entities import Param

        all_tags = {"rayclip.version": __version__, **_code_version(), **(tags or {})}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        client = self._client()
        run = client.create_run(self.experiment_id, run_name=name, tags=all_tags).info.run_id
        entries = [Param(key, str(value)) for key, value in (params or {}).items()]
        for i in range(0, len(entries), _PARAMS_AT_ONCE):
            client.log_batch(run, params=entries[i : i + _PARAMS_AT_ONCE])
        return run

    def exists(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client().get_run(run).info.lifecycle_stage == "active"
        except MlflowException:
            return False

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, value, now, step) for name, value, step in values]
        for i in range(0, len(entries), _METRICS_AT_ONCE):
            self._client().log_batch(run, metrics=entries[i : i + _METRICS_AT_ONCE])

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        log = self._client().log_artifacts if path.is_dir() else self._client().log_artifact
        log(run, str(path), folder or None)

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
        self._client().log_table(run, data=columns, artifact_file=name)

    def finish(self, run: str, *, failed: bool = False) -> None:
        self._client().set_terminated(run, "FAILED" if failed else "FINISHED")


def _code_version() -> dict[str, str]:
    """The commit of the checkout that the package runs from, if it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    tags = {"mlflow.source.name": " ".join(Path(sys.argv[0]).parts[-2:]), "mlflow.source.type": "LOCAL"}
    return tags | ({"mlflow.source.git.commit": result.stdout.strip()} if result.returncode == 0 else {})

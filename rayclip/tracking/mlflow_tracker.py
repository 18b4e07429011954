"""Write runs to MLflow through its client, with explicit run ids: nothing depends on a process's active run."""

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayclip.tracking import names
from rayclip.tracking.address import check_address, check_database, explained, refuse_secret, sqlite_file
from rayclip.types import UserError, redacted
from rayclip.version import code_version

# MLflow's limits on one request
_METRICS_AT_ONCE = 1000
_PARAMS_AT_ONCE = 100
_TEXT = 5000  # characters of a tag
_NAME = 250  # of a run's name

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # makes the UI show it as model training, not GenAI

KEY = "rayclip.key"  # the tag of a run that holds our key for it
NOTE = "mlflow.note.content"  # the tag that the UI shows as a description, in Markdown


def look(uri: str, *, to_write: bool = False) -> int | None:
    """Return the number of experiments in a store; None for an SQLite file that does not exist yet.

    Args:
        to_write: also require that runs can be logged there.

    Raises:
        UserError: it cannot be reached, or denies access.
    """
    check_address(uri, to_write=to_write)
    file = sqlite_file(uri)
    return None if file is not None and not file.is_file() else MlflowTracker(uri, "").count_experiments()


def quiet_client(uri: str) -> Any:
    """Return MLflow's client, with the log messages of database migrations silenced."""
    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def told(text: str) -> str:
    """Return a text that can be sent to MLflow: secrets are redacted, bytes of file names that are no UTF-8 escaped."""
    return redacted(text.encode("utf-8", "backslashreplace").decode())


def shorten(text: str, longest: int) -> str:
    """Cut the middle out of a text that is too long: names of models differ at their ends."""
    tail = longest // 2
    return text if len(text) <= longest else f"{text[: longest - tail - 1]}…{text[-tail:]}"


def is_away(error: Exception) -> bool:
    """Return whether an error is temporary (MLflow takes nothing now), not a refusal of this entry."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return isinstance(error, OSError)  # includes the errors of `requests`
    status = error.get_http_status_code()
    return not 400 <= status < 500 or status in (401, 403, 408, 429)  # a wrong password can be corrected


class MlflowTracker:
    """An MLflow experiment to log to; see `types.Tracker` for the methods.

    Raises:
        UserError: its address holds a password, which would appear in logs and results.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        refuse_secret(uri)
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
        self.uri, self.experiment = uri, experiment
        self._pictures: dict[str, set[str]] = {}  # keys of the pictures in each run
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # fail fast: entries wait in the spool
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for our tables
        self._experiment_id: str | None = None

    def contact(self) -> None:
        """Connect to the store, and create the experiment if there is none.

        Raises:
            AwayError: it cannot be reached now, or denies access.
            UserError: it cannot be logged to.
        """
        check_address(self.uri)
        check_database(self.uri)
        with explained(self.uri):
            _ = self.experiment_id

    def count_experiments(self) -> int:
        """Return the number of experiments; create none. Raises as `contact` does."""
        check_database(self.uri)
        with explained(self.uri):
            return len(self.client().search_experiments())

    def find_experiment(self, name: str) -> tuple[str | None, list[str]]:
        """Return the id of an experiment (None if there is none) and the names of all. Raises as `contact` does."""
        with explained(self.uri):
            client = self.client()
            found = client.get_experiment_by_name(name)
            return found and found.experiment_id, [e.name for e in client.search_experiments()]

    @property
    def experiment_id(self) -> str:
        """Id of the experiment, which is created if there is none."""
        if self._experiment_id is None:
            client = self.client()
            found = client.get_experiment_by_name(self.experiment)
            if found and found.lifecycle_stage != "active":
                raise UserError(
                    f"the MLflow experiment '{self.experiment}' was deleted: give another name, or run "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`."
                )
            if found:
                self._experiment_id = found.experiment_id
            else:
                self._experiment_id = client.create_experiment(
                    self.experiment, artifact_location=self._artifact_location(), tags=_KIND
                )
        assert self._experiment_id is not None
        return self._experiment_id

    @property
    def address(self) -> str:
        return f"{self.uri} {self.experiment}"

    def _artifact_location(self) -> str | None:
        """Return the folder beside an SQLite file, whatever directory a worker runs in; None lets a server decide."""
        file = sqlite_file(self.uri)
        return None if file is None else (file.parent / "mlruns").as_uri()

    def client(self) -> Any:
        return quiet_client(self.uri)

    def start(
        self,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        time_ms: int | None = None,
    ) -> str:
        """Create a run and return its id; keys are changed to what MLflow accepts (`names.key`).

        Args:
            time_ms: time of the start; None is now.
        """
        from mlflow.entities import Param

        all_tags = dict(tags or {})
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        client = self.client()
        all_tags = {names.key(key): told(value) for key, value in all_tags.items()}
        shown = shorten(told(name), _NAME)
        made = client.create_run(self.experiment_id, run_name=shown, tags=all_tags, start_time=time_ms)
        run = made.info.run_id
        entries = [Param(names.key(key), told(str(value))) for key, value in (params or {}).items()]
        for i in range(0, len(entries), _PARAMS_AT_ONCE):
            client.log_batch(run, params=entries[i : i + _PARAMS_AT_ONCE])
        return run

    def exists(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client().get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if is_away(error):
                raise
            return False

    def find(self, key: str) -> str | None:
        """Return the id of the run whose tag `rayclip.key` is this key, or None."""
        found = self.client().search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
        return found[0].info.run_id if found else None

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]], *, time_ms: int | None = None) -> None:
        """Log (name, value, step) triples; MLflow stores a value that is sent twice with the same time once.

        Args:
            time_ms: time of the measurement; None is now.
        """
        from mlflow.entities import Metric

        now = time_ms or int(time.time() * 1000)
        entries = [Metric(name, value, now, step) for name, value, step in values]
        for i in range(0, len(entries), _METRICS_AT_ONCE):
            self.client().log_batch(run, metrics=entries[i : i + _METRICS_AT_ONCE])

    def names(self, run: str) -> set[str]:
        """Return the names of a run's metrics."""
        return set(self.client().get_run(run).data.metrics)

    def last(self, run: str, name: str) -> tuple[int, float]:
        """Return a metric's last step and the last value at that step; (-1, 0) if it has no values."""
        history = self.client().get_metric_history(run, name)
        newest = max(history, key=lambda m: (m.step, m.timestamp), default=None)
        return (-1, 0.0) if newest is None else (newest.step, newest.value)

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        log = self.client().log_artifacts if path.is_dir() else self.client().log_artifact
        log(run, str(path), folder or None)

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log a table, replacing one of the same name: MLflow itself would append to it."""
        client = self.client()
        if any(f.path == name for f in client.list_artifacts(run)):
            client.log_dict(run, {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}, name)
        else:
            columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
            client.log_table(run, data=columns, artifact_file=name)

    def describe(self, run: str | None, text: str) -> None:
        """Set a run's description, or (None) that of the experiment if it has none, in Markdown."""
        if len(text) > _TEXT:
            text = f"{text[: _TEXT - 40].rpartition(chr(10))[0]}\n\n(The whole is in the artifacts.)"
        client, text = self.client(), told(text)
        if run is not None:
            client.set_tag(run, NOTE, text)
        elif NOTE not in client.get_experiment(self.experiment_id).tags:
            client.set_experiment_tag(self.experiment_id, NOTE, text)

    def image(self, run: str, key: str, png: bytes) -> None:
        """Log a picture for the UI's image gallery, once per key."""
        from PIL import Image

        client = self.client()
        if run not in self._pictures:  # MLflow names files key+step+…, in some versions key%step%…
            found = [Path(f.path).name for f in client.list_artifacts(run, "images")]
            self._pictures[run] = {re.split("[+%]", name)[0] for name in found}
        if key in self._pictures[run]:
            return
        try:
            client.log_image(run, Image.open(io.BytesIO(png)), key=key, step=0)
        except BaseException:
            del self._pictures[run]  # it may have been stored all the same: list again
            raise
        self._pictures[run].add(key)

    def data(self, run: str, name: str, digest: str, context: str, about: Mapping[str, Any]) -> None:
        """Log a data set that a run has used, as an MLflow dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = told(json.dumps({"spec": about.get("spec", name)}))
        dataset = Dataset(name, digest, "rayclip", source, profile=told(json.dumps(dict(about))))
        self.client().log_inputs(run, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def finish(self, run: str, *, failed: bool = False, time_ms: int | None = None) -> None:
        """End a run.

        Args:
            time_ms: time of the end; None is now.
        """
        self.client().set_terminated(run, "FAILED" if failed else "FINISHED", end_time=time_ms)


def source_tags() -> dict[str, str]:
    """Return tags with the program that logs and its code version; the UI shows them as a run's source."""
    code, program = code_version(), " ".join(Path(sys.argv[0]).parts[-2:])
    tags = {"rayclip.version": code["version"], "mlflow.source.name": program, "mlflow.source.type": "LOCAL"}
    return tags | ({"mlflow.source.git.commit": code["commit"]} if "commit" in code else {})

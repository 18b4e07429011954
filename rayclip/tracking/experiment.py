"""Write to an MLflow experiment through MLflow's client, with explicit run ids: nothing depends on an active run."""

import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rayclip.data.leases import Leases
from rayclip.store import Store
from rayclip.tracking.address import (
    absolute,
    check_address,
    check_database,
    default_uri,
    explained,
    join_address,
    sqlite_file,
)
from rayclip.tracking.names import key as safe_key
from rayclip.types import UserError

# MLflow's limits on one request
_METRICS_AT_ONCE = 1000
_PARAMS_AT_ONCE = 100
_TEXT = 5000  # characters of a tag
_NAME = 250  # of a run's name

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # makes the UI show it as model training, not GenAI

_KEY = "rayclip.key"  # the tag of a run that holds its id in the journal
RESULTS, MODEL = "rayclip.results", "rayclip.model"  # tags: folder of the results; fingerprint of the model
NOTE = "mlflow.note.content"  # the tag that the UI shows as a description, in Markdown


def count_experiments(uri: str, *, to_write: bool = False) -> int | None:
    """Return the number of experiments in a store; None for an SQLite file that does not exist yet. Raises as
    `connected`."""
    check_address(uri, to_write=to_write)
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        return None
    with connected(uri) as client:
        return len(client.search_experiments())


@contextmanager
def connected(uri: str, *, to_write: bool = False) -> Iterator[Any]:
    """Yield MLflow's client for an address; errors of MLflow within the block are explained.

    Raises an `AwayError` if it cannot be reached now, or denies access; a `UserError` if it cannot be used.
    """
    check_address(uri, to_write=to_write)
    check_database(uri)
    with explained(uri):
        yield _make_client(uri)


def _make_client(uri: str) -> Any:
    """Return MLflow's client, with the log messages of database migrations silenced."""
    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def is_away(error: Exception) -> bool:
    """Return whether an error is temporary (MLflow takes nothing now), not a refusal of this event."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return isinstance(error, OSError)  # includes the errors of `requests`
    status = error.get_http_status_code()
    return not 400 <= status < 500 or status in (401, 403, 408, 429)  # a wrong password can be corrected


def is_run(text: str) -> bool:
    """Return whether a text is a run id, with or without `runs:/`."""
    return re.fullmatch(r"(runs:/)?[0-9a-f]{32}", text) is not None


def results_of(run: str, uri: str | None) -> tuple[str, str | None]:
    """Return the folder of a run's results, and the fingerprint of its model (None for all). Raise a `UserError` if
    unknown."""
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


class Experiment:
    """An MLflow experiment to log to. Runs are named by MLflow's ids; what is sent twice is there once.

    Raises a `UserError` if its address holds a password, which would appear in logs and results.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri, self.name = absolute(uri), name
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # fail fast: events wait in the journal
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for our tables
        self._id: str | None = None

    @property
    def address(self) -> str:
        """The store and the name."""
        return join_address(self.uri, self.name)

    @property
    def client(self) -> Any:
        return _make_client(self.uri)

    def contact(self) -> None:
        """Connect to the store, and create the experiment if there is none. Raises as `connected` does."""
        check_address(self.uri, to_write=True)
        file = sqlite_file(self.uri)
        alone: AbstractContextManager[bool] = nullcontext(True)
        if file is not None:  # MLflow makes its tables at the first connection, which two commands cannot do at once
            alone = Leases(Store(str(file.parent))).hold(file.name, "opening the database")
        with alone, connected(self.uri, to_write=True):
            _ = self.id

    @property
    def id(self) -> str:
        """MLflow's id of the experiment, which is created if there is none."""
        if self._id is None:
            found = self.client.get_experiment_by_name(self.name)
            if found and found.lifecycle_stage != "active":
                raise UserError(
                    f"the MLflow experiment '{self.name}' was deleted: give another name, or run "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`."
                )
            if found:
                self._id = found.experiment_id
            else:
                from mlflow.exceptions import MlflowException

                file = sqlite_file(self.uri)  # whatever directory a command runs in; a server decides itself
                place = None if file is None else (file.parent / "mlruns").as_uri()
                try:
                    self._id = self.client.create_experiment(self.name, artifact_location=place, tags=_KIND)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    return self.id  # another command was faster
        assert self._id is not None
        return self._id

    def start(
        self,
        name: str,
        *,
        key: str = "",
        parent: str | None = None,
        params: Mapping[str, Any] = {},
        tags: Mapping[str, str] = {},
        time_ms: int | None = None,
    ) -> str:
        """Return the id of the run of this key (an id of ours), which is created if there is none.

        Keys of params and tags are changed to what MLflow accepts (`names.key`).
        """
        from mlflow.entities import Param

        run = self.find(key) if key else None
        if run is None:
            ours = {_KEY: key, "mlflow.parentRunId": parent}
            all_tags = {safe_key(name): value for name, value in tags.items()}
            all_tags |= {name: value for name, value in ours.items() if value}
            made = self.client.create_run(self.id, run_name=_shorten(name), tags=all_tags, start_time=time_ms)
            run = str(made.info.run_id)
        entries = [Param(safe_key(name), str(value)) for name, value in params.items()]
        for i in range(0, len(entries), _PARAMS_AT_ONCE):
            self.client.log_batch(run, params=entries[i : i + _PARAMS_AT_ONCE])
        return run

    def exists(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if is_away(error):
                raise
            return False

    def find(self, key: str) -> str | None:
        """Return the id of the run whose tag `rayclip.key` is this key, or None."""
        found = self.client.search_runs([self.id], f"tags.`{_KEY}` = '{key}'", max_results=1)
        return found[0].info.run_id if found else None

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]], time_ms: int) -> None:
        """Log (name, value, step) triples; MLflow keeps a value that is sent twice with the same time once."""
        from mlflow.entities import Metric

        entries = [Metric(safe_key(name), value, time_ms, step) for name, value, step in values]
        for i in range(0, len(entries), _METRICS_AT_ONCE):
            self.client.log_batch(run, metrics=entries[i : i + _METRICS_AT_ONCE])

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Store a file, or a folder with all its contents."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(run, str(path), folder or None)

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log a table, replacing one of the same name: MLflow itself would append to it."""
        if any(f.path == name for f in self.client.list_artifacts(run)):
            self.client.log_dict(run, {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}, name)
        else:
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            self.client.log_table(run, data=columns, artifact_file=name)

    def describe(self, run: str | None, text: str) -> None:
        """Set a run's description, or (None) that of the experiment if it has none, in Markdown."""
        if len(text) > _TEXT:
            text = f"{text[: _TEXT - 40].rpartition(chr(10))[0]}\n\n(The whole is in the artifacts.)"
        if run is not None:
            self.client.set_tag(run, NOTE, text)
        elif NOTE not in self.client.get_experiment(self.id).tags:
            self.client.set_experiment_tag(self.id, NOTE, text)

    def image(self, run: str, key: str, png: bytes) -> None:
        """Log a picture for the UI's image gallery, once per key."""
        from PIL import Image

        there = [Path(f.path).name for f in self.client.list_artifacts(run, "images")]
        if key not in {re.split("[+%]", name)[0] for name in there}:  # named key+step+…, in some versions key%step%…
            self.client.log_image(run, Image.open(io.BytesIO(png)), key=key, step=0)

    def data(self, run: str, name: str, digest: str, context: str, about: Mapping[str, Any]) -> None:
        """Log a data set that a run has used, as an MLflow dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"spec": about.get("spec", name)})
        dataset = Dataset(name, digest, "rayclip", source, profile=json.dumps(dict(about)))
        self.client.log_inputs(run, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def finish(self, run: str, *, failed: bool = False, time_ms: int | None = None) -> None:
        self.client.set_terminated(run, "FAILED" if failed else "FINISHED", end_time=time_ms)


def _shorten(name: str) -> str:
    """Cut the middle out of a name that is too long: names of models differ at their ends."""
    tail = _NAME // 2
    return name if len(name) <= _NAME else f"{name[: _NAME - tail - 1]}…{name[-tail:]}"

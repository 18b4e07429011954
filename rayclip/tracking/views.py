"""Start the MLflow UI and open it at an experiment's trials, with accuracies as columns and charts."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Mapping, Sequence

from rayclip.tracking.address import default_uri, sqlite_file
from rayclip.tracking.experiment import connected, count_experiments
from rayclip.types import UserError, redacted

_START_S = 60.0
_WORKFLOW = "workflowType=machine_learning"  # makes the UI show runs and models, not agents
_KINDS = ("train", "model", "eval", "retrieval")  # what is shown of an experiment: the first kind that it has
_VIEW = "mlflow.sharedViewState."  # tags of an experiment: views of its runs, that the UI opens by their name
_LONGEST = 5000  # characters of such a tag
_PARAMS = ("method.name", "shots", "method.eps")


def serve(uri: str | None, experiment: str | None, *, port: int, browser: bool) -> None:
    """Start a server for a local store and run it until Ctrl-C, or use the server at `uri`; show its page.

    Raises a `UserError` if there is no MLflow, no such experiment, or the port is taken.
    """
    uri = uri or default_uri()
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"there is no MLflow store at '{uri}' yet: run something first, or give --tracking-uri.")
    is_server = uri.startswith("http")
    if not is_server:
        count_experiments(uri)  # reports a bad address before a server is started on it
    elif not _answers(uri.rstrip("/")):
        raise UserError(f"MLflow at '{redacted(uri)}' does not answer: start it, or give another --tracking-uri.")
    path = f"/#/experiments?{_WORKFLOW}" if experiment is None else f"/#/experiments/{page(uri, experiment)}"
    if is_server:
        _show(uri.rstrip("/") + path, browser)
        return
    base = f"http://127.0.0.1:{port}"
    if _answers(base):
        raise UserError(f"port {port} is taken: give another --port.")
    options = f"--host 127.0.0.1 --port {port} --workers 1".split()
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, *options])
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(base):
            if server.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the MLflow server did not start on port {port}: see its messages above.")
            time.sleep(0.3)
        _show(base + path, browser)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def page(uri: str, experiment: str) -> str:
    """Return the UI's page of an experiment's trials, or else of its evaluations, the best ones first."""
    from mlflow.exceptions import MlflowException

    with connected(uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = ", ".join(e.name for e in client.search_experiments())
            raise UserError(f"MLflow at '{uri}' has no experiment '{experiment}': it has {known}.")
        for kind in _KINDS:
            wanted = f"tags.`rayclip.kind` = '{kind}'"
            if runs := client.search_runs([found.experiment_id], wanted, max_results=100):
                break
        else:
            return f"{found.experiment_id}/runs?{_WORKFLOW}"
        metrics = accuracies({name for run in runs for name in run.data.metrics})
        params = {name: [run.data.params.get(name) for run in runs] for name in _PARAMS}
        sorted_by = metrics[-1] if metrics else "train/loss"  # sorted by time, trials would hide below their parent
        view = {"searchFilter": wanted, "orderByKey": f"metrics.`{sorted_by}`", "orderByAsc": not metrics}
        options = {**view, "orderByAsc": str(not metrics).lower()}
        state = _state(view, params, metrics)
        try:
            client.set_experiment_tag(found.experiment_id, f"{_VIEW}rayclip", state)
            options = {"viewStateShareKey": "rayclip"}
        except MlflowException:
            pass  # a user who may only read sees the same runs and charts, without the columns
    return f"{found.experiment_id}/runs?{_WORKFLOW}&{urllib.parse.urlencode(options | {'compareRunsMode': 'CHART'})}"


def accuracies(names: set[str]) -> list[str]:
    """Return those of a run's metrics that are accuracies or recalls, the worst case last; averages alone if any."""
    kinds = ("clean/", "robust/", "worst")
    averages = sorted(name for name in names if name.startswith("avg/"))
    return averages or [name for kind in kinds for name in sorted(names) if name.startswith(kind)]


def _can_be_drawn(values: Sequence[str | None]) -> bool:
    """Return whether all runs have a value, and all or none of them numbers: MLflow would leave the others out."""
    numbers = {re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) is not None for value in values if value is not None}
    return None not in values and len(numbers) == 1


def _state(view: Mapping[str, object], params: Mapping[str, Sequence[str | None]], metrics: Sequence[str]) -> str:
    """Return a view of the runs as the UI keeps it: columns, parallel coordinates, a bar chart per metric."""
    section = {"uuid": "rayclip", "metricSectionId": "rayclip", "deleted": False, "isGenerated": False}
    drawn = [name for name, values in params.items() if _can_be_drawn(values)]
    charts: list[dict[str, object]] = [{"type": "PARALLEL", "selectedParams": drawn, "selectedMetrics": list(metrics)}]
    charts += [{"type": "BAR", "metricKey": name, "displayName": name} for name in metrics]
    charts = [{**section, "uuid": f"rayclip-{i}", "runsCountToCompare": 100, **c} for i, c in enumerate(charts)]
    columns = [f"params.`{name}`" for name, values in params.items() if any(values)]
    columns += [f"metrics.`{name}`" for name in metrics]
    sections = [{**section, "name": "Accuracies in %", "display": True, "columns": 2, "isReordered": False}]
    text = json.dumps({**view, "selectedColumns": columns, "compareRunCharts": charts, "compareRunSections": sections})
    return text if len(text) <= _LONGEST else _state(view, params, metrics[1:])


def _answers(base: str) -> bool:
    try:
        urllib.request.urlopen(f"{base}/health", timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, OSError):
        return False
    return True


def _show(address: str, browser: bool) -> None:
    print(f"MLflow: {redacted(address)}", flush=True)
    if browser:
        webbrowser.open(address)

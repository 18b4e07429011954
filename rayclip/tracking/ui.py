"""Start the MLflow UI and open it at an experiment's runs."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser

from rayclip.tracking.address import default_uri, sqlite_file
from rayclip.tracking.mlflow_tracker import MlflowTracker, look
from rayclip.types import UserError, redacted

_START_S = 60.0
_WORKFLOW = "workflowType=machine_learning"  # makes the UI show runs and models, not agents


def serve(uri: str | None, experiment: str | None, *, port: int, browser: bool) -> None:
    """Start a server for a local store and run it until Ctrl-C, or use the server at `uri`; show its page.

    Raises:
        UserError: no MLflow there, no such experiment, or the port is taken.
    """
    uri = uri or default_uri()
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"there is no MLflow store at '{uri}' yet: run something first, or give --tracking-uri.")
    if not uri.startswith("http"):
        look(uri)  # reports a bad address before a server is started on it
    elif not _answers(uri.rstrip("/")):
        raise UserError(f"MLflow at '{redacted(uri)}' does not answer: start it, or give another --tracking-uri.")
    page = f"/#/experiments?{_WORKFLOW}"
    if experiment is not None:
        found, known = MlflowTracker(uri, "").find_experiment(experiment)
        if found is None:
            raise UserError(f"MLflow at '{uri}' has no experiment '{experiment}': it has {', '.join(known)}.")
        page = f"/#/experiments/{found}/runs?{_WORKFLOW}"
    if uri.startswith("http"):
        _show(uri.rstrip("/") + page, browser)
        return
    base = f"http://127.0.0.1:{port}"
    if _answers(base):
        raise UserError(f"port {port} is taken: give another --port.")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            uri,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
    )
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(base):
            if server.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the MLflow server did not start on port {port}: see its messages above.")
            time.sleep(0.3)
        _show(base + page, browser)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


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

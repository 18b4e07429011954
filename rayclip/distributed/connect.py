"""Connect to Ray: start a private instance on this machine, or join a running cluster."""

import json
import logging
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rayclip.distributed import compat, tokens
from rayclip.distributed.session import environment, make_import_hook, short_folder
from rayclip.terminal import interrupted, stop
from rayclip.types import UserError

# Set while Ray runs, so that its workers inherit them; the user's own values are kept.
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same for the user and for a worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; finished work is on disk
    "RAY_AIR_NEW_OUTPUT": "0",  # rayclip's own progress is shown instead of Tune's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a report between two measurements has no score
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A private Ray is one process tree: it has no nodes to be preempted and can check health more often.
_LOCAL_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for a submitted job's entry point
_HOOK = "worker_process_setup_hook"
_PASSED_ON = ("RAYCLIP_MODELS",)  # variables passed on to workers: the models that a checkpoint may name
_REFUSED = (
    f"the Ray cluster refuses this machine's token: set {tokens.MODE}=token and {tokens.TOKEN} to what "
    "`ray get-auth-token` prints on the cluster's head."
)
_LOCAL_OBJECT_STORE = 256 << 20  # bytes; data go through files, not through the object store


@contextmanager
def ray_cluster(*, cluster: bool = False, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for the block; a private Ray ends with it.

    A private Ray requires a token that only its own processes know, unless another `RAY_AUTH_MODE` or a token is set.

    Args:
        cluster: connect to a running cluster: `RAY_ADDRESS`, or the cluster that this machine belongs to. Inside `ray
            job submit` the job's cluster is always used.
        verbose: show Ray's log and the output of its workers.

    Raises:
        UserError: Ray does not start; no cluster answers, or it refuses the token; or Ray itself fails in the block.
    """
    local = not cluster and not in_submitted_job()
    defaults = _SETTINGS | _LOCAL_SETTINGS if local else _SETTINGS
    settings = {name: os.environ.get(name, value) for name, value in defaults.items()}
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its errors are returned anyway
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # the caller's own connection
        with environment(settings):
            yield
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    with environment(settings), short_folder() if local else nullcontext():
        wanted = tokens.settings_for_private_ray() if local else tokens.settings_for_cluster(address)
        with tokens.in_force(wanted):  # before Ray is imported, if it is not yet
            import ray
            from ray.exceptions import RayError

            from rayclip.distributed.faults import explain

            try:
                with _sigterm_kept():
                    quiet = {"log_to_driver": verbose, "logging_level": level}
                    _start(quiet) if local else _join(address, quiet)
                yield
            except RayError as error:
                shown = explain(error)
                if shown is error:
                    raise
                raise shown from error
            finally:
                ray.shutdown()


def in_submitted_job() -> bool:
    """Return whether this process is the entry point of a job that was submitted to a cluster."""
    return _JOB in os.environ


def describe_cluster() -> tuple[int, str]:
    """Return the number of nodes of the connected Ray, and a description of their resources."""
    import ray

    found = ray.cluster_resources()
    said = [f"{found.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU")]
    return sum(node["Alive"] for node in ray.nodes()), ", ".join([*said, f"{found.get('memory', 0) / 2**30:.0f} GiB"])


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block: Ray replaces it with one that prints a stack of its C++ code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # raised by Ray's handler, if SIGTERM arrived in the block
        if error.code != signal.SIGTERM or before in (signal.SIG_DFL, signal.SIG_IGN):
            raise
        stop(signal.SIGTERM)
    finally:
        # If there was no handler before, keep the Python handler that Ray has set: it ends the process in order
        if not interrupted():
            ours = signal.getsignal(signal.SIGTERM) if before in (signal.SIG_DFL, None) else before
            signal.signal(signal.SIGTERM, ours)


def _start(quiet: Mapping[str, Any]) -> None:
    """Start a private Ray."""
    import ray

    from rayclip.distributed.faults import first_line

    hook = make_import_hook()
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE,
            runtime_env=None if hook is None else {_HOOK: hook},
            **quiet,
        )
    except Exception as error:  # Ray has no exception type for a node that is not up in time
        raise UserError(
            f"Ray does not start on this machine ({first_line(error)}): see that it has memory, processes and room in "
            "/dev/shm and TMPDIR to spare, and try again."
        ) from error


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    import grpc
    import ray
    from ray.exceptions import AuthenticationError, RayError

    from rayclip.distributed.faults import first_line

    answers = False
    try:
        tokens.check_present()  # without a token, ray.init ends the process
        listens = tokens.greet(address)  # Ray itself would retry for long, as with a token that is refused
        if listens and not address.startswith("ray://"):
            compat.check_access(address)
        answers = listens
        with warnings.catch_warnings(action="ignore"):  # errors are raised as well
            ray.init(address=address, runtime_env=_runtime_env(address), **quiet)
    except AuthenticationError as error:
        raise UserError(_REFUSED) from error
    except (OSError, RuntimeError, ValueError, RayError, grpc.RpcError) as error:
        if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAUTHENTICATED:  # over ray://
            raise UserError(_REFUSED) from error
        # Such a cluster may refuse a token without an answer
        unknown = address == "auto"
        token = f"see that {tokens.TOKEN} is its token, " if unknown or address.startswith("ray://") else ""
        if answers or (unknown and not isinstance(error, OSError)):
            versions = f"Ray {ray.__version__} and Python {platform.python_version()}"
            raise UserError(
                f"{address} answers, but as a Ray cluster it cannot be joined from here: see that it has the versions "
                f"of this machine ({versions}) and is up (ray status), {token}or leave --cluster out to use this "
                f"machine alone ({first_line(error, lines=8)})."
            ) from error
        raise UserError(
            "no Ray cluster answers: start one (ray start --head), set RAY_ADDRESS to its address (ray://HOST:10001 "
            f"from a machine that is not one of its own), {token}or leave --cluster out to use this machine alone "
            f"({first_line(error)})."
        ) from error


def _runtime_env(address: str) -> dict[str, Any] | None:
    """Return the runtime environment for the workers of a running cluster, whose own environment is different.

    It holds this process's settings and, for a driver outside the cluster (`ray://`), also this package's code.
    """
    of_job = json.loads(os.environ.get(_JOB) or "{}").get("runtime_env", {})
    passed_on = (os.environ.keys() & _PASSED_ON) - of_job.get("env_vars", {}).keys()  # Ray refuses those of the job
    found: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in passed_on}} if passed_on else {}
    if address.startswith("ray://"):
        return {"py_modules": [str(Path(__file__).parents[1])], **found}
    hook = None if {"working_dir", _HOOK} & of_job.keys() else make_import_hook()
    return {**found, **({_HOOK: hook} if hook else {})} or None

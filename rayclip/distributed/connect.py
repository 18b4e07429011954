"""Connect to Ray: start a private instance on this machine, or join a running cluster."""

import json
import logging
import os
import platform
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rayclip.distributed.faults import explained, first_line
from rayclip.distributed.session import import_as_here, short_folder
from rayclip.terminal import interrupted, stop
from rayclip.types import UserError

# Set before Ray starts, so that its workers inherit them; the user's own values are kept.
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
# The variables that decide whether Ray asks for a token, and where it finds one.
_TOKEN_MODE, _TOKEN_SOURCES = "RAY_AUTH_MODE", ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_START = "worker_process_setup_hook"
_TOLD = ("RAYCLIP_MODELS",)  # variables passed on to workers: the models that a checkpoint may name
_GREETING_S, _SETTINGS_FRAME = 10.0, 4
_LOCAL_OBJECT_STORE = 256 << 20  # bytes; data go through files, not through the object store


@contextmanager
def ray_cluster(*, cluster: bool = False, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for the block; a private Ray ends with it.

    A private Ray requires a token that only its own processes know, unless another `RAY_AUTH_MODE` or a token is set.

    Args:
        cluster: connect to a running cluster: `RAY_ADDRESS` (`HOST:6379` on one of its machines, `ray://HOST:10001`
            from elsewhere), or the cluster this machine belongs to. Inside `ray job submit` the job's cluster is always
            used.
        verbose: show Ray's log and the output of its workers.

    Raises:
        UserError: Ray does not start; no cluster answers, or it refuses the token; or Ray itself fails in the block.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    in_job = _JOB in os.environ  # set by Ray for a submitted job's entry point
    local = not cluster and not in_job
    if local:
        for name, value in _LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)

    import ray
    from ray.exceptions import RayError

    level = logging.INFO if verbose else logging.ERROR
    for name, quiet_level in (("ray", level), ("ray.train", level), ("ray.tune", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level if verbose else quiet_level)  # Tune's errors are returned anyway
    if ray.is_initialized():  # the caller's own connection
        yield
        return
    quiet = {"log_to_driver": verbose, "logging_level": level}
    address = os.environ.get("RAY_ADDRESS", "auto")
    with short_folder() if local else nullcontext(), _private_token() if local else _token_for(address):
        try:
            with _sigterm_kept():
                if local:
                    _start(quiet)
                else:
                    _join(address, quiet)
            yield
        except RayError as error:
            shown = explained(error)
            if shown is error:
                raise
            raise shown from error
        finally:
            ray.shutdown()


def cluster_holds() -> tuple[int, str]:
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

    start = import_as_here()
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE,
            runtime_env=None if start is None else {_START: start},
            **quiet,
        )
    except Exception as error:  # Ray has no exception type for a node that is not up in time
        raise UserError(
            f"Ray does not start on this machine ({first_line(error)}): see that it has memory, processes and room in "
            "/dev/shm and TMPDIR to spare, and try again."
        ) from error


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    import ray
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.exceptions import AuthenticationError, RayError

    answers = False
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # without a token, ray.init ends the process
        _knock(address)
        answers = True
        with warnings.catch_warnings(action="ignore"):  # errors are raised as well
            ray.init(address=address, runtime_env=_runtime_env(address), **quiet)
    except Exception as error:  # over ray:// also gRPC's own exceptions
        if isinstance(error, AuthenticationError) or "authentication token" in str(error):
            raise UserError(
                "the Ray cluster refuses this machine's token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what "
                "`ray get-auth-token` prints on the cluster's head."
            ) from error
        if not isinstance(error, OSError | RuntimeError | ValueError | RayError):
            raise
        # Over ray:// a cluster that refuses the token may not answer at all
        token = "see that RAY_AUTH_TOKEN is its token, " if address.startswith("ray://") else ""
        if answers:
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
    settings = {name: os.environ[name] for name in _TOLD if name in os.environ}
    told = json.loads(os.environ.get(_JOB) or "{}").get("runtime_env", {})
    settings = {name: value for name, value in settings.items() if name not in told.get("env_vars", {})}
    found: dict[str, Any] = {"env_vars": settings} if settings else {}  # Ray rejects a variable that the job has set
    if address.startswith("ray://"):
        return {"py_modules": [str(Path(__file__).parents[1])], **found}
    start = None if {"working_dir", _START} & told.keys() else import_as_here()
    return {**found, **({_START: start} if start else {})} or None


@contextmanager
def _private_token() -> Iterator[None]:
    """Set a fresh token for the Ray that starts in this block; it is kept in the environment, not on disk."""
    chosen = os.environ.get(_TOKEN_MODE, "token").lower() != "token" or any(s in os.environ for s in _TOKEN_SOURCES)
    own = {_TOKEN_MODE: "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _known_token() if chosen else _environment(own):
        yield


@contextmanager
def _token_for(address: str) -> Iterator[None]:
    """Let Ray use this machine's token in the block if the cluster asks for one.

    A cluster that asks for no token sends none either, and a driver with a token refuses its calls: no actor would ever
    start.
    """
    asks = _TOKEN_MODE in os.environ or not _is_open(address)
    with _known_token() if asks else _environment({_TOKEN_MODE: "disabled"}):
        yield


def _is_open(address: str) -> bool:
    """Return whether a cluster at this address answers without a token."""
    from ray.exceptions import AuthenticationError, RayError

    if address.startswith("ray://"):
        return False  # unknown without a connection
    with _environment({_TOKEN_MODE: "disabled"}):
        try:
            _knock(address)
        except (AuthenticationError, OSError, RuntimeError, ValueError, RayError):
            return False
    return True


@contextmanager
def _known_token() -> Iterator[None]:
    """Let Ray use this machine's token in the block, if there is one: by default Ray sends it only when told to."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    _read_again()
    try:
        has_token = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        raise UserError("RAY_AUTH_TOKEN_PATH names no file that holds a token: correct or unset it.") from error
    with _environment({_TOKEN_MODE: "token"} if has_token and _TOKEN_MODE not in os.environ else {}):
        yield


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in the block and make Ray read them again: it read them when it was imported."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _knock(address: str) -> None:
    """Raise at once if nothing listens at `host:port` or the connection is refused: Ray itself would retry for long."""
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client = address.startswith("ray://")
    address = address.removeprefix("ray://") if client else canonicalize_bootstrap_address(address) or ""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=5) as door:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("0", "false"):
                _greet(door)
        if not client:
            GcsClient(address=address)


def _greet(door: socket.socket) -> None:
    """Raise an `OSError` unless the peer speaks HTTP/2, which Ray's gRPC uses (RFC 9113, 3.4).

    A peer that does not answer would keep Ray waiting for minutes.
    """
    door.settimeout(_GREETING_S)
    door.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS_FRAME, 0, 0, 0, 0, 0)))
    try:
        answer = door.recv(9)  # a frame's header: length, type, flags, stream
    except TimeoutError:
        raise OSError("something listens there but says nothing") from None
    if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
        raise OSError("something else than Ray answers there")

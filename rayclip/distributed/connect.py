"""Connecting to Ray: a private one on this machine, or a running cluster."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rayclip.types import UserError

# Set before Ray starts, so that its workers inherit them; whatever the user has set stays.
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same to the user and to a worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; what is done is on disk
    "RAY_AIR_NEW_OUTPUT": "0",  # our own progress is shown instead of Tune's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A private Ray lives in one process tree: it needs no watch for preempted nodes and can look more often.
_LOCAL_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
_LOCAL_OBJECT_STORE = 256 << 20  # bytes; our data go through files, not through the object store


@contextmanager
def ray_cluster(*, cluster: bool = False, verbose: bool = False) -> Iterator[None]:
    """A Ray to work with; a private one ends with the block.

    Args:
        cluster: connect to a running cluster: `RAY_ADDRESS`, or the one this machine belongs to. Inside `ray job
            submit` it is used without being asked for.
        verbose: let Ray print what its workers print.

    Raises:
        UserError: no cluster answers.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray for a submitted job's entry point
    local = not cluster and not in_job
    if local:
        for name, value in _LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)

    import ray

    level = logging.INFO if verbose else logging.ERROR
    for name, quiet_level in (("ray", level), ("ray.train", level), ("ray.tune", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level if verbose else quiet_level)  # Tune's errors come back to us anyway
    if ray.is_initialized():  # a caller's own
        yield
        return
    quiet = {"log_to_driver": verbose, "logging_level": level}
    if local:
        ray.init(address="local", include_dashboard=False, object_store_memory=_LOCAL_OBJECT_STORE, **quiet)
    else:
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                "no Ray cluster answers: start one (ray start --head), set RAY_ADDRESS to its address, or "
                f"leave --cluster out to use this machine alone ({str(error).splitlines()[0][:120]})."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise an OSError if nobody listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()

"""The only names of Ray that are not public. Each is looked up here and has a public substitute if it is gone.

Ray reads `RAY_AUTH_MODE` and the token once, at import, and has no public way to read them again; and nothing public
tells within a second whether a cluster wants a token: `ray.init` needs twenty, and prints as many lines.
"""

import subprocess
import sys
from importlib import import_module
from typing import Any

_STATUS_S = 60.0  # maximum time for `ray status`


def _find(name: str) -> Any:
    return getattr(import_module("ray._raylet"), name, None)


def reread_environment() -> bool:
    """Make Ray use the present `RAY_AUTH_*` variables; return whether it does.

    If the names are gone, the variables only count when Ray has not been imported yet.
    """
    if "ray" not in sys.modules:
        return True
    config, loader = _find("Config"), _find("AuthenticationTokenLoader")
    if config is None or loader is None:
        return False
    config.initialize("")
    loader.instance().reset_cache()
    return True


def check_access(address: str) -> None:
    """Raise Ray's `AuthenticationError` at once if the cluster at `HOST:PORT` refuses this process's token.

    If the name is gone, `ray.init` finds out later.
    """
    client = _find("GcsClient")
    if client is not None:
        client(address=address)


def is_open(address: str) -> bool:
    """Return whether the cluster at an address answers without a token. Needs `RAY_AUTH_MODE=disabled` in force."""
    if address != "auto" and "ray" in sys.modules and _find("GcsClient") is not None:
        from ray.exceptions import AuthenticationError, RayError

        try:
            check_access(address)
        except (AuthenticationError, OSError, RuntimeError, ValueError, RayError):
            return False
        return True
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "status"]
    command += ["--address", address] if address != "auto" else []
    try:
        return subprocess.run(command, capture_output=True, timeout=_STATUS_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False

"""Choose the token with which this process and its workers talk to Ray, and set it in the environment."""

import contextlib
import functools
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rayclip.distributed import compat
from rayclip.distributed.greeting import greet
from rayclip.distributed.session import environment
from rayclip.types import UserError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def in_force(settings: Mapping[str, str]) -> Iterator[None]:
    """Set token variables in the block, also for a Ray that was imported before; put back what Ray itself sets."""
    present = {name: os.environ.get(name) for name in (MODE, TOKEN, TOKEN_PATH)}
    with contextlib.ExitStack() as stack:
        stack.callback(compat.reread_environment)  # once the variables are back
        stack.enter_context(environment({**present, **settings}))
        compat.reread_environment()
        yield


def settings_for_private_ray() -> dict[str, str]:
    """Return the variables for a Ray of this process alone: the user's own choice, or a token kept only in memory."""
    if os.environ.get(MODE, "token").lower() != "token":
        return {}
    own = {} if TOKEN in os.environ or TOKEN_PATH in os.environ else {TOKEN: _own_token()}
    if not own:
        has_token()
    # If Ray cannot be told any more, it decides on the mode by itself
    return own | ({MODE: "token"} if compat.reread_environment() else {})


def settings_for_cluster(address: str) -> dict[str, str]:
    """Return the variables for a running cluster: this machine's token only if the cluster asks for one.

    A cluster that asks for no token sends none either, and a driver with a token refuses its calls: no actor would ever
    start. Over `ray://` a token is always sent, as it cannot be known before.
    """
    if MODE in os.environ:
        return {}
    if not has_token():
        return {MODE: "disabled"}
    if not address.startswith("ray://"):
        try:
            greet(address)
        except OSError:  # whoever joins says what is wrong
            return {MODE: "token"}
        with in_force({MODE: "disabled"}):
            if compat.is_open(address):
                return {MODE: "disabled"}
    return {MODE: "token"}


def check_present() -> None:
    """Raise Ray's error if tokens are in force and this machine has none."""
    from ray.exceptions import AuthenticationError

    if os.environ.get(MODE, "").lower() == "token" and not has_token():
        raise AuthenticationError("this machine has no token")


def has_token() -> bool:
    """Return whether this machine has a token where Ray looks for one.

    Raises:
        UserError: `RAY_AUTH_TOKEN_PATH` names no file that holds one.
    """
    if os.environ.get(TOKEN):
        return True
    chosen = os.environ.get(TOKEN_PATH)
    try:
        found = Path(chosen or Path.home() / ".ray" / "auth_token").read_text().strip()
    except OSError:
        found = ""
    if chosen and not found:
        raise UserError(f"{TOKEN_PATH} names no file that holds a token: correct or unset it.")
    return bool(found)


@functools.cache
def _own_token() -> str:
    """One for all private Rays of this process: Ray may remember the first."""
    return secrets.token_hex(32)

"""Choose the token with which this process and its workers talk to Ray, and set it in the environment."""

import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rayclip.distributed import compat
from rayclip.distributed.session import environment
from rayclip.types import UserError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_GREETING_S, _SETTINGS_FRAME = 10.0, 4


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

    A driver with a token refuses the calls of a cluster without. Over `ray://` it is sent, as that cannot be known
    before.
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
    """Return whether this machine has a token where Ray looks for one. Raise a `UserError` if `RAY_AUTH_TOKEN_PATH`
    holds none."""
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


def greet(address: str) -> bool:
    """Raise an `OSError` unless the peer speaks HTTP/2, which Ray's gRPC uses (RFC 9113, 3.4).

    Return False if the address is still to be found.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return False
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false"):
            return True
        connection.settimeout(_GREETING_S)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS_FRAME, 0, 0, 0, 0, 0)))
        try:
            answer = connection.recv(9)  # a frame's header: length, type, flags, stream
        except TimeoutError:
            raise OSError("something listens there but says nothing") from None
    if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
        raise OSError("something else than Ray answers there")
    return True

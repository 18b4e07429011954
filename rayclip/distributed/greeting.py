"""Find out at once whether anything at an address speaks Ray's protocol: Ray itself would retry for long."""

import os
import socket

_GREETING_S, _SETTINGS_FRAME = 10.0, 4


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

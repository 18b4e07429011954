"""An HTTP server that passes requests on to another one, badly when told so: late, with errors, or not to the end."""

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from socketserver import BaseServer

_DELAY_S, _LOSS, _RESEND_S = 0.1, 0.02, 1.0  # each way; TCP sends a lost segment again after a second at most
_ALWAYS_SENT = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class Relay:
    """Passes on what arrives at `port`.

    Attributes:
        fault: `late` (200 ms there and back, 2 % of the messages a second later), `503` (the answer to every fifth
            request), `cut` (the connection ends in the middle of every fifth answer that has a body), or None.
        broken: how many requests had a fault.
    """

    def __init__(self, host: str, target: tuple[str, int], seed: int = 0) -> None:
        self.fault: str | None = None
        self.broken = 0
        self._target, self._random, self._numbers = target, random.Random(seed), count(1)
        pass_on = self._pass_on

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with suppress(ConnectionError, TimeoutError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        for method in ("GET", "PUT", "POST", "HEAD", "DELETE", "PATCH", "OPTIONS"):
            setattr(Handler, f"do_{method}", lambda handler: pass_on(handler))
        self.server = ThreadingHTTPServer((host, 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        body = _read_body(handler)
        fifth = next(self._numbers) % 5 == 0
        if self.fault == "503" and fifth:
            self.broken += 1
            handler.send_response(503, "Slow Down")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self._wait()
        connection = http.client.HTTPConnection(*self._target, timeout=120)
        try:
            connection.request(handler.command, handler.path, body, {**dict(handler.headers), "Connection": "close"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):  # as if nobody listened
            handler.close_connection = True
            return
        finally:
            connection.close()
        self._wait()
        handler.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _ALWAYS_SENT:
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(content))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if self.fault == "cut" and fifth and len(content) > 1:
            self.broken += 1
            content = content[: len(content) // 2]
            handler.close_connection = True
        handler.wfile.write(content)

    def _wait(self) -> None:
        if self.fault == "late":
            self.broken += 1
            time.sleep(_DELAY_S + _RESEND_S * (self._random.random() < _LOSS))


def _read_body(handler: BaseHTTPRequestHandler) -> bytes | None:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        length = int(handler.headers.get("Content-Length") or 0)
        return handler.rfile.read(length) if length else None
    del handler.headers["Transfer-Encoding"]
    chunks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return b"".join(chunks)


@contextmanager
def relay(host: str, target: tuple[str, int], seed: int = 0) -> Iterator[Relay]:
    """A relay at a free port of this host, until the end of the block."""
    passing = Relay(host, target, seed)
    server: BaseServer = passing.server
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield passing
    finally:
        server.shutdown()
        server.server_close()

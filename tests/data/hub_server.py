"""The part of the Hugging Face hub that its client needs to read data sets, on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class HubServer:
    """Serves the repositories ROOT/ORG/NAME. Set the attributes at any time.

    Attributes:
        root: the folder of repositories; what is in them now is revision `main`.
        url: for HF_ENDPOINT.
        token: opens the gated repositories.
        gated: repositories that are listed for everyone, their files only given with `token`.
        private: repositories that are not there without `token`.
        status: answered instead of a file, by its path in the repository.
        breaks: after how many bytes the connection breaks, one for each request for a file, by its path.
        requests: what was asked: method, path in the repository (or of the API), range.
    """

    root: Path
    url: str = ""
    token: str = "hf_secret"
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def commit(self, repo: str) -> str:
        """The commit that `main` is: a hash of the repository's content."""
        digest = hashlib.sha1()
        for path in self.files(repo):
            digest.update(f"{path}\0".encode() + (self.root / repo / path).read_bytes())
        return digest.hexdigest()

    def files(self, repo: str) -> list[str]:
        folder = self.root / repo
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order, the API left out."""
        return [path for method, path, _ in self.requests if method == "GET" and not path.startswith("/api")]


@contextmanager
def serve_hub(root: Path) -> Iterator[HubServer]:
    """Serve a folder of repositories until the block ends."""
    hub = HubServer(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client to acknowledge its headers

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self.hub.requests.append((self.command, urlsplit(self.path).path, None))
            self._api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            self.hub.requests.append((self.command, "/".join(parts[5:]), self.headers.get("Range")))
            self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._error(404, "RepoNotFound", "no such page")

    def _may_not_see(self, repo: str) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not (self.hub.root / repo).is_dir() or (repo in self.hub.private and not known):
            self._error(404 if known else 401, "RepoNotFound", "Repository not found")
            return True
        return False

    def _wrong_revision(self, repo: str, revision: str) -> bool:
        if revision in ("main", self.hub.commit(repo)):
            return False
        self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return True

    def _api(self, repo: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if "api" in self.hub.status:
            self._error(self.hub.status["api"], "", "the server has a bad day")
        elif self._may_not_see(repo) or self._wrong_revision(repo, revision):
            return
        elif rest[:1] == ["tree"]:
            sizes = {f: (self.hub.root / repo / f).stat().st_size for f in self.hub.files(repo)}
            self._json([{"type": "file", "path": f, "size": s, "oid": "0" * 40} for f, s in sizes.items()])
        else:
            siblings = [{"rfilename": f} for f in self.hub.files(repo)]
            gated = "manual" if repo in self.hub.gated else False
            self._json({"id": repo, "sha": self.hub.commit(repo), "gated": gated, "siblings": siblings})

    def _file(self, repo: str, revision: str, path: str) -> None:
        if path in self.hub.status:
            self._error(self.hub.status[path], "", "the server has a bad day")
            return
        if self._may_not_see(repo):
            return
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            known = self.headers.get("Authorization") is not None
            self._error(403 if known else 401, "GatedRepo", f"Access to dataset {repo} is restricted.")
            return
        if self._wrong_revision(repo, revision):
            return
        if path not in self.hub.files(repo):
            self._error(404, "EntryNotFound", "Entry not found", commit=self.hub.commit(repo))
            return
        data = (self.hub.root / repo / path).read_bytes()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if breaks := self.hub.breaks.get(path):
            self.wfile.write(data[first : first + breaks.pop(0)])
            self.close_connection = True  # before all that Content-Length has promised
        else:
            self.wfile.write(data[first:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

"""What the tests of data sets share."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from data.hub_server import serve_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories yet, and an empty cache; the real client asks it."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    quick = SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0)  # the client waits between its attempts
    monkeypatch.setattr(huggingface_hub.file_download, "time", quick)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", quick)
    (tmp_path / "repos").mkdir()
    with serve_hub(tmp_path / "repos") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
    huggingface_hub.close_session()

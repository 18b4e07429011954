import pytest

from calling import call


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a command that needs no process of its own in this one; what it printed."""

    def run_here(cwd, *args):
        monkeypatch.chdir(cwd)
        code, out, err = call(monkeypatch, capsys, *args)
        assert code == 0, err
        return out

    return run_here

"""Call the command line in this process."""

import sys

import pytest

from rayclip.cli.app import app as rayclip_app
from rayclip.cli.running import run


def call(monkeypatch, capsys, *args, app=None, program="rayclip"):
    """Run in this process; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        run(app or rayclip_app, program)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err

"""Call the command line in this process."""

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

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


def run_here(cwd, *args, check=True, program="rayclip", **env):
    """As `e2e.test_commands.run`, but in this process: for commands where nothing is about the process itself.

    Args:
        program: `rayclip`, or a sweep's file.
        env: variables of the environment while it runs.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    arguments = [str(program), *map(str, args)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", arguments)
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            if program == "rayclip":
                run(rayclip_app, program)
            else:
                runpy.run_path(str(program), run_name="__main__")
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert not check or stop.value.code == 0, stderr[-3000:]
    return subprocess.CompletedProcess(arguments, stop.value.code, stdout, stderr)

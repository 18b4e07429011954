"""SIGTERM and Ctrl-C stop a command cleanly, and a second one ends it at once."""

import signal
import subprocess
import sys

import pytest

COMMAND = """
import multiprocessing, sys, time, typer
from rayclip.cli.running import run
app = typer.Typer()
def child():
    time.sleep(60)
@app.command()
def main():
    other = multiprocessing.get_context("fork").Process(target=child)
    other.start()
    time.sleep(0.3)
    other.terminate()
    other.join()
    try:
        print("child", other.exitcode, flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60 if slow else 0)
        print("clean", flush=True)
sys.argv, slow = sys.argv[:1], sys.argv[1:]
run(app, "x")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("slow", [[], ["slow"]])
def test_the_first_stops_cleanly_and_a_second_at_once(number, code, slow):
    command = [sys.executable, "-c", COMMAND, *slow]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"child {-signal.SIGTERM}\n", "a process of a pool is ended as ever"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    if slow:
        process.send_signal(number)
    # `communicate` would pass over what the line before has read ahead
    with process.stdout, process.stderr:
        stdout, stderr = process.stdout.read(), process.stderr.read()
    process.wait(timeout=30)
    assert stdout == ("" if slow else "clean\n")
    assert stderr == ("" if slow else "note: stopped; the same command goes on from here.\n")
    assert process.returncode == (-number if slow else code), "which a shell calls the same"

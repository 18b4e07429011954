"""What a command says while it works: lines, bars on a real pseudo-terminal, JSON."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta
from fcntl import ioctl

import pytest

from rayclip import progress
from rayclip.progress import Display


def lines(capsys, *updates, **options):
    with Display(**options) as display:
        for update in updates:
            display.update(*update)
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_task_has_few_lines_and_one_at_its_end(capsys):
    out = lines(
        capsys, ("a", 0, 0, "waiting"), *(("a", i, 100, f"loss {i}") for i in range(101)), ("a", 100, 100, "again")
    )
    assert len(out) == 2 and "a" in out[0] and "0/100" in out[0]
    assert "100/100" in out[1] and out[1].endswith("loss 100")


def test_quiet_says_nothing(capsys):
    assert lines(capsys, ("a", 1, 1, "done"), quiet=True) == []


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_the_rate_is_of_this_run_and_of_work_not_of_waiting(capsys, clock):
    with Display() as display:
        display.update("evaluating", 500, 1000, "waiting for a worker")  # 500 are there from an earlier run
        clock(40)
        display.update("evaluating", 500, 1000, "waiting for a worker")
        clock(20)
        display.update("evaluating", 700, 1000, "pgd-10 37 %")
        clock(5)
        display.update("evaluating", 750, 1000, "too soon for a line")
        clock(35)
        display.update("evaluating", 800, 1000)
        clock(15)
        display.update("evaluating", 1000, 1000)
    said = capsys.readouterr().err.splitlines()
    assert said[2] == "[  60 s] evaluating             700/1000  10.0/s  0:30 left  pgd-10 37 %"
    assert said[3] == "[ 100 s] evaluating             800/1000  5.0/s  0:40 left"
    assert said[4] == "[ 115 s] evaluating             1000/1000  6.7/s"
    assert len(said) == 5 and all(len(line) <= 80 for line in said)


def test_seconds_left_that_are_known_count_more_than_the_rate(capsys, clock):
    with Display() as display:
        display.update("evaluating", 0, 1000)
        clock(20)
        display.update("evaluating", 900, 1000, "clean: accuracy 97 %", 3600.0)  # cheap images first
        display.update("evaluating", 1000, 1000, "", 0.0)
    assert "1:00:00 left" in capsys.readouterr().err


def test_a_total_that_is_not_known_has_a_rate_and_no_end(capsys, clock):
    with Display() as display:
        for done in (0, 30, 60):
            display.update("pets train", done, 0, "1 set aside" if done else "")
            clock(60)
        display.update("pets train", 90, 90)
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == [
        "pets train             30/?  1 set aside",
        "pets train             60/?  0.5/s  1 set aside",
        "pets train             90/90  0.5/s",
    ]


@pytest.mark.parametrize(
    ("seconds", "rate", "shown"),
    [(7, 0.25, "0:07 0.25/s"), (754.4, 12.34, "12:34 12.3/s"), (3723, 1234, "1:02:03 1234/s")],
)
def test_times_and_rates_are_short(seconds, rate, shown):
    assert f"{progress._clock(seconds)} {progress._pace(rate)}" == shown


def on_terminal(code: str, columns: int = 80, rows: int = 30) -> list[list[str]]:
    """What Python code draws on a terminal, frame by frame."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time\nfrom rayclip.progress import Display, say\n{code}"],
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 65536):
            drawn += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0
    frames = re.split(r"(?:\r?\x1b\[2K(?:\x1b\[1A)?)+", drawn.decode())
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).replace("\r", "").splitlines() for frame in frames]


EVALUATION = """
with Display() as display:
    display.update("evaluating", 0, 12000)
    for cell in range(11):
        display.part(str(cell), f"a-model-with-a-long-name-{cell} · cifar10 · pgd-100_eps1", 1000)
    time.sleep(0.5)
    for cell in range(3):
        display.part(str(cell), "", 1000, 1000)
    display.part("3", "", 1000, 250)
    display.update("evaluating", 3250, 12000, "pgd-100_eps1 37 %, and a note that is too long for a terminal of 80")
    time.sleep(0.7)
    display.part("3", "", 1000, 750)
    display.update("evaluating", 12000, 12000, "pgd-100_eps1 41 %")
"""


def test_cells_in_work_have_bars_below_the_total_and_leave_when_they_are_finished():
    frames = on_terminal(EVALUATION)
    assert all(len(line) <= 80 for frame in frames for line in frame)
    first = next(frame for frame in frames if any("and 3 more cells" in line for line in frame))
    assert len(first) == 10 and first[0].startswith("evaluating") and "0/12000" in first[0]
    second = next(frame for frame in frames if frame and "3250/12000" in frame[0])
    assert re.search(r"3250/12000 +\d+/s +0:0\d$", second[0].rstrip()), second[0]
    assert len(second) == 9 and "a-model-with-a-long-name-3" in second[1] and "more" not in second[-1]
    assert re.search(r"━ +250/1000 +\d+/s +0:0\d$", second[1].rstrip()), second[1]
    last = [line for line in frames[-1] if line.strip()]
    assert len(last) == 1 and "12000/12000" in last[0], "nothing piles up"


def test_of_many_trials_those_at_work_are_shown():
    code = """
with Display() as display:
    for trial in range(40):
        display.update(f"mmcoa {trial}-shot", 0, 0, "waiting")
    for trial in range(15):
        display.update(f"mmcoa {trial}-shot", 100, 100, "epoch 5/5, loss 0.100")
    display.update("mmcoa 15-shot", 40, 100, "epoch 2/5, loss 0.812")
    time.sleep(0.4)
"""
    frames = on_terminal(code)
    shown = [line.rstrip() for line in frames[-1] if line.strip()]
    assert len(shown) == 2 and shown[0].startswith("mmcoa 15-shot  epoch 2/5, loss 0.812") and "40/100" in shown[0]
    assert shown[1] == "and 39 more; 15 of 40 are done"


def test_what_is_said_meanwhile_stands_above_the_bars():
    code = """
with Display() as display:
    display.update("a", 1, 2)
    say("warning", "look at this")
    time.sleep(0.4)
"""
    assert "warning: look at this" in [line.strip() for frame in on_terminal(code) for line in frame]


@pytest.mark.parametrize("quiet", [False, True])
def test_json_is_all_that_stands_on_standard_error(quiet):
    """Progress, notes, warnings of libraries, and an error that nobody foresaw."""
    code = """
import logging, time, warnings
from rayclip import progress
progress.log_as_json()
with progress.Display(quiet=QUIET) as display:
    display.update("evaluating", 0, 200, "waiting")
    time.sleep(1.1)
    display.update("evaluating", 50, 200, "pgd 37 %")
    display.update("evaluating", 60, 200)
    display.part("c", "model · data · pgd", 100, 10)
    display.update("evaluating", 200, 200)
progress.say("note", "ünïcode, and\\ntwo lines")
warnings.warn("old")
logging.getLogger("a.library").error("broken %d", 3)
1 / 0
"""
    done = subprocess.run([sys.executable, "-c", code.replace("QUIET", str(quiet))], capture_output=True, text=True)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and done.stdout == ""
    assert all(datetime.now(UTC) - datetime.fromisoformat(each["time"]) < timedelta(minutes=1) for each in found)
    told = [each for each in found if each["level"] == "progress"]
    assert [each["completed"] for each in told] == ([] if quiet else [0, 50, 200])
    if told:
        assert told[0] | {"time": ""} == {
            "time": "",
            "level": "progress",
            "task": "evaluating",
            "completed": 0,
            "total": 200,
            "per_second": None,
            "seconds_left": None,
            "note": "waiting",
        }
        assert told[1]["per_second"] == pytest.approx(45, rel=0.1) and told[1]["note"] == "pgd 37 %"
        assert told[1]["seconds_left"] == pytest.approx(3.3, rel=0.1) and told[2]["seconds_left"] == 0
    note, warned, logged, error = found[len(told) :]
    assert (note["level"], note["message"]) == ("note", "ünïcode, and\ntwo lines")
    assert warned["level"] == "warning" and "UserWarning: old" in warned["message"]
    assert (logged["level"], logged["message"], logged["logger"]) == ("error", "broken 3", "a.library")
    assert error["message"] == "ZeroDivisionError: division by zero" and error["traceback"]

"""Whatever the terminal can show: a result is printed, in substitutes where its encoding has no such sign."""

import io
import json
import os
import subprocess
import sys

import pytest

from rayclip.reports.rows import show_rows
from rayclip.types import Row
from test_progress import on_terminal

PROTOCOL = {"attack": "clean", "template": "a {}", "resolution": "native", "precision": "fp32", "seed": 0}
PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "100"}


def shown(monkeypatch, names, encoding):
    """What `show_rows` prints of models of these names, where standard output has an encoding."""
    rows = [
        Row(
            model=name,
            dataset="té st",
            attack="clean",
            eps=None,
            steps=None,
            n=4,
            top1=75.0,
            ci_low=30.1,
            ci_high=95.4,
            protocol=PROTOCOL,
            cell=name,
        )
        for name in names
    ]
    printed = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
        show_rows(rows)
        sys.stdout.flush()
        return printed.getvalue().decode(encoding)


def python(code, **env):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | PLAIN | env, check=False)
    assert done.returncode == 0, done.stderr.decode("latin-1")
    return done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "koi8-r"])
def test_a_table_comes_out_in_every_encoding(monkeypatch, encoding):
    lines = shown(monkeypatch, ["é-model", "ê-model", "模型"], encoding).splitlines()
    whole = shown(monkeypatch, ["é-model", "ê-model", "模型"], "utf-8").splitlines()
    assert len(lines) == len(whole)
    numbers = [line.split()[-2:] for line in lines if "model" in line and "75.0" in line]
    assert len(numbers) == 2 and all(number in (["75.0", "30-95"], ["75.0", "30–95"]) for number in numbers)
    models = [line.split()[0] for line in lines if "75.0" in line]
    assert len(set(models)) == 3, "two names stay two"
    assert r"\u6a21\u578b" in models


@pytest.mark.parametrize("command", [["eval", "--help"], ["data", "list"]])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_commands_print_in_every_encoding(encoding, command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rayclip", *command],
        capture_output=True,
        env=os.environ | PLAIN | {"PYTHONIOENCODING": encoding, "RAYCLIP_DATA": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0 and len(done.stdout) > 100, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_errors_are_one_sentence_and_json_stays_json(encoding, tmp_path):
    command = [sys.executable, "-m", "rayclip", "eval", "--model", "digits", "--data", "digits", "--out", "/proc/–é模"]
    env = os.environ | PLAIN | {"PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 2 and done.stderr.decode(encoding).count("\n") == 1
    assert done.stderr.decode(encoding).startswith("error: --out /proc/-") and b"\\u6a21" in done.stderr
    done = subprocess.run([*command, "--json-logs"], capture_output=True, cwd=tmp_path, env=env, check=False)
    assert "/proc/–é模" in json.loads(done.stderr)["message"]


def test_bars_are_drawn_in_every_encoding(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    frames = on_terminal(
        'with Display() as display:\n    display.part("1", "é · x[/b] :bug:", 10)\n'
        '    display.update("evaluating…", 3, 12)\n    say("note", "é–")\n    time.sleep(0.5)'
    )
    text = "\n".join(line for frame in frames for line in frame)
    assert r"\xe9 . x[/b] :bug:" in text and "evaluating..." in text and r"note: \xe9-" in text


def test_names_are_no_markup(monkeypatch):
    """Brackets are rich's tags, and words between colons its pictures."""
    names = ["local-dir:tecoa[eps=1]", "local-dir:tecoa[eps=2]", "local-dir:x[/b]", "a:bug:b", r"back\[slash]"]
    text = shown(monkeypatch, names, "utf-8")
    found = [line.split()[0] for line in text.splitlines() if "75.0" in line]
    assert found == names


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        ("{run} data list | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}", None, ""),
        ("{run} --version | true; exit ${{PIPESTATUS[0]}}", None, ""),
        ("{run} data list >&-", 0, ""),
        ("{run} data list 2>&-", 0, ""),
        ("{run} data list > /dev/full", 2, "No space left on device"),
        ("{run} eval --out x 2> /dev/full", 2, ""),
    ],
)
def test_output_that_goes_nowhere_is_no_traceback(shell, code, says, tmp_path):
    command = shell.format(run=f"{sys.executable} -m rayclip")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert says in done.stderr and done.stderr.count("\n") == bool(says)
    assert code is None or done.returncode == code


def test_a_closed_output_does_not_lend_its_number_to_the_next_file(tmp_path):
    code = (
        "import os\nfrom rayclip import terminal\nterminal.prepare()\n"
        "number = os.open('results', os.O_CREAT | os.O_WRONLY)\nassert number > 2, number\nos.write(1, b'stray')\n"
        "print('also')\n"
    )
    command = f'{sys.executable} -c "$CODE" >&-'
    done = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"CODE": code}, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results").read_bytes() == b""


def test_a_reader_of_progress_that_goes_away_does_not_end_the_work():
    code = (
        "import os, sys\nfrom rayclip.progress import Display, say\nread, write = os.pipe()\nos.dup2(write, 2)\n"
        "os.close(read)\nos.close(write)\nsay('note', 'x')\n"
        "with Display() as display:\n    display.update('task', 5, 5)\nprint('done', flush=True)\nos._exit(0)\n"
    )
    assert python(code) == b"done\n"


@pytest.mark.parametrize(("declares", "written"), [(True, "é–模\n".encode()), (False, b"\xe9-\\u6a21\n")])
def test_a_document_says_truly_what_it_is_written_in(declares, written):
    code = f"from rayclip import terminal\nterminal.write_document('\\xe9\\u2013\\u6a21\\n', declares_utf8={declares})"
    assert python(code, PYTHONIOENCODING="latin-1") == written

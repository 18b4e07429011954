"""Every command line that the project writes down is taken by the parser it is for, and nothing of it is dropped."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import typer

from cluster.files import documents, walk
from rayclip.api import training
from rayclip.attacks import parse_attacks
from rayclip.cli.app import app
from rayclip.cli.options import refuse_repeats
from rayclip.evaluation.cell import at_budgets
from rayclip.models import load_model
from rayclip.types import UserError
from rayclip.units import parse_budgets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("rayclip/*/README.md"))]
SWEEPS = {path.name: path for path in sorted((ROOT / "sweeps").glob("*.py"))}
# A program at the start of a command, behind variables, or as what another program starts; and what follows it, up to
# the next command of the shell line
COMMAND = re.compile(
    r"(?:^|&&|-- |slurm\.sh )\s*(?:[A-Z_]+=\S+\s+)*(rayclip(?= +[a-z-])|python sweeps/\w+\.py)(?=\s|$)"
    r"((?:'[^']*'|[^|&;)])*)"
)


def joined(text: str) -> str:
    """A command that goes on in the next line as one line, in comments too."""
    return re.sub(r"\\\n\s*(?:#\s*)?", " ", text)


def fenced(text: str) -> list[str]:
    """The lines of Markdown's code blocks, without what shells take for comments."""
    blocks = re.split(r"^```.*\n", text, flags=re.MULTILINE)[1::2]
    return [re.sub(r"\s#.*", "", line) for block in blocks for line in joined(block).splitlines()]


def inline(text: str) -> list[str]:
    """What stands in single backticks outside of code blocks."""
    prose = "\n".join(re.split(r"^```.*\n", text, flags=re.MULTILINE)[::2])
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def comments(text: str) -> list[str]:
    return [line.lstrip("# ") for line in joined(text).splitlines() if line.lstrip().startswith("#")]


def docstring(path: Path) -> list[str]:
    lines = joined(ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    return [re.sub(r"\s#.*", "", line) for line in lines if line.startswith("    ")]


def written() -> list[tuple[str, str, bool]]:
    """(place, command line, whether it is whole: prose may leave options away)."""
    found: list[tuple[str, str, bool]] = []
    for path in PAGES:
        page, text = str(path.relative_to(ROOT)), path.read_text()
        found += [(page, line, True) for line in fenced(text)] + [(page, code, False) for code in inline(text)]
    for path in sorted((ROOT / "cluster").iterdir()):
        found += [(path.name, line, True) for line in comments(path.read_text())]
        if path.suffix == ".yaml" and "apiVersion:" in path.read_text():
            texts = (value for document in documents(path.name) for _, value in walk(document))
            found += [(path.name, text, True) for text in texts if isinstance(text, str) and "rayclip eval" in text]
    for name, path in SWEEPS.items():
        found += [(name, line, True) for line in docstring(path)]
    commands = [
        (place, f"{program} {' '.join(rest.split())}", whole and "…" not in rest)
        for place, line, whole in found
        for program, rest in COMMAND.findall(line)
    ]
    return list(dict.fromkeys(commands))


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The click command of a program: `rayclip` itself, or the one that a sweep's file starts."""
    if program == "rayclip":
        return typer.main.get_command(app)
    started: list[Any] = []
    monkeypatch.setattr("rayclip.cli.sweep.run_app", lambda command, name: started.append(command))
    runpy.run_path(str(SWEEPS[program]), run_name="__main__")
    return typer.main.get_command(started[0])


def parse(command: Any, arguments: list[str], *, whole: bool) -> None:
    """What the program does with its arguments before it does anything else.

    Raises:
        Exception: of click, for what it does not take; what is missing is allowed where a line is not `whole`.
        UserError: an option is given twice and would be dropped.
    """
    refuse_repeats(command, arguments)
    left = list(arguments)
    while left and left[0] in getattr(command, "commands", {}):
        command = command.commands[left.pop(0)]
    if hasattr(command, "commands"):  # parsed only: completion would be installed on this machine
        assert not left or left[0].startswith("-"), f"no command {left[0]}"
        command.make_parser(typer.Context(command)).parse_args(left)
        return
    try:
        taken = command.make_context("documented", left).params
        if whole and taken.get("attacks"):  # their settings and budgets are parsed, too
            at_budgets(parse_attacks(",".join(taken["attacks"]), {}), parse_budgets(taken["eps"] or []))
    except Exception as error:
        if whole or type(error).__name__ not in ("MissingParameter", "NoArgsIsHelpError"):
            raise


@pytest.mark.parametrize(("place", "line", "whole"), written(), ids=lambda value: str(value)[:80])
def test_it_is_taken_whole(place, line, whole, monkeypatch):
    words = [word for word in shlex.split(line) if word != "…"]
    program = "rayclip" if words[0] == "rayclip" else Path(words.pop(0) and words[0]).name
    parse(parser_of(program, monkeypatch), words[1:], whole=whole)


def test_the_pages_are_read():
    """The search finds what is known to be there, so that an empty list does not pass for a good one."""
    lines = written()
    assert {place for place, _, _ in lines} >= {"README.md", "kuberay-job.yaml", "slurm.sh", "aws.yaml", *SWEEPS}
    assert any("--data cifar10 --data dtd" in line and whole for _, line, whole in lines)
    assert any(line.startswith("rayclip plan") and "--workers 1,8,64" in line for _, line, _ in lines)
    assert sum(line.startswith("rayclip ") and whole for _, line, whole in lines) > 7


@pytest.mark.parametrize(
    "line", ["eval --model digits --data digits --out o --epsilon 1/255", "report r --out a.md --out b.md", "evaluate"]
)
def test_what_is_unknown_or_would_be_dropped_is_noticed(line, monkeypatch):
    with pytest.raises(Exception, match=r"--epsilon|given twice|no command") as caught:
        parse(parser_of("rayclip", monkeypatch), shlex.split(line), whole=True)
    assert isinstance(caught.value, UserError | AssertionError) or type(caught.value).__name__ == "NoSuchOption"


BENCHMARKS = [
    line
    for line in sorted(set(inline((ROOT / "tests/benchmarks/README.md").read_text())))
    if (ROOT / "tests/benchmarks" / line.split(" ")[0]).is_file()
]
# In a process of its own, where `attacks` is the benchmark and no folder of tests
PARSE_ALL = """
import argparse, runpy, shlex, sys

class Parsed(BaseException):
    pass

def stop(self, *args, **kwargs):
    parse_args(self, *args, **kwargs)
    raise Parsed

parse_args, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop
lines, path = sys.argv[1:], list(sys.path)
for line in lines:
    sys.argv, sys.path[:] = shlex.split(line), path
    for name in ("attacks", "methods"):  # what the one before has imported, from where its own path leads
        sys.modules.pop(name, None)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Parsed:
        print(line)
"""


@pytest.mark.e2e
def test_benchmarks_take_their_command_lines():
    assert len(BENCHMARKS) > 10
    words = [sys.executable, "-c", PARSE_ALL, *BENCHMARKS]
    done = subprocess.run(words, cwd=ROOT / "tests/benchmarks", capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines(), done.returncode) == (BENCHMARKS, 0), done.stderr


def test_the_readme_s_python_runs(monkeypatch):
    """As it is written, but on small things: the bundled model and data, few steps; the training is only asked for."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    smaller = {
        "ViT-B-32:openai": "digits",
        "cifar10": "digits",
        "pgd:steps=100": "pgd:steps=2",
        "autoattack": "autoattack:iterations=1,queries=2",
        "limit=1000": "limit=3",
    }
    for written_there, here in smaller.items():
        assert written_there in block
        block = block.replace(written_there, here)
    asked = []
    monkeypatch.setattr(training, "fine_tune", lambda trial, where: asked.append(trial.config))
    digits = load_model("digits")
    names: dict[str, Any] = {
        "my_module": digits.model,
        "preprocess": open_clip.image_transform(8, is_train=False),
        "tokenizer": open_clip.SimpleTokenizer(context_length=digits.model.context_length),
        "images": torch.rand(4, 3, 8, 8),
        "labels": torch.tensor([0, 1, 0, 1]),
    }
    exec(block, names)
    assert names["found"].images.shape == (4, 3, 8, 8) and len(names["rows"]) == 4  # the worst case too
    assert asked[0].method.name == "tecoa" and asked[0].method.eps == 1 / 255

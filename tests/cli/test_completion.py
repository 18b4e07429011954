"""Shell completion: a real bash, the answers that zsh and fish get, and what it costs."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rayclip.attacks import ATTACKS
from rayclip.data.registry import DATASETS
from rayclip.defenses.registry import DEFENSES
from rayclip.methods.registry import METHODS

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def bash(script: str, **environment: str) -> list[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def completions(lines: Sequence[str]) -> list[list[str]]:
    """What one bash offers after the last word of each command line."""
    script = ['eval "$(rayclip --show-completion)"']
    for line in lines:
        words = line.split(" ")
        script.append(f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; COMPREPLY=()")
        script.append('_rayclip_completion rayclip; printf "%s\\n" "${COMPREPLY[@]}" END')
    return [part.split() for part in "\n".join(bash("\n".join(script))).split("END")[:-1]]


OFFERED = {
    "rayclip retr": ["retrieval"],
    "rayclip eval --json-": ["--json-logs"],
    "rayclip eval --attacks clean,co": ["clean,co-attack"],
    "rayclip eval --attacks ": list(ATTACKS),
    "rayclip eval --defense none,rn+tt": ["none,rn+ttc", "none,rn+tte"],
    "rayclip eval --defense ": ["none", *DEFENSES],
    "rayclip eval --model d": ["digits"],
    "rayclip eval --model local-dir": [],  # bash goes on with files
    "rayclip eval --precision b": ["bf16"],
    "rayclip train --method t": ["tecoa", "tga-zsr"],
    "rayclip train --method ": list(METHODS),
    "rayclip data show ": list(DATASETS),
    "rayclip data prepare cifar10 ": list(DATASETS),
    "rayclip captions filter x.json --data fl": ["flickr30k", "flickr8k", "flowers102", "flowers102-coop"],
}


@pytest.mark.ci
def test_bash_completes():
    for (line, offered), found in zip(OFFERED.items(), completions(list(OFFERED)), strict=True):
        assert sorted(found) == sorted(offered), line


def test_completion_is_installed_for_bash_where_it_reads_it(tmp_path):
    bash("rayclip --install-completion && true", HOME=str(tmp_path))  # bash stays the command's parent, which is asked
    assert bash("source ~/.bashrc; complete -p rayclip", HOME=str(tmp_path))[-1] == "rayclip"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_a_script_and_an_answer(shell):
    asked = {"_TYPER_COMPLETE_ARGS": "rayclip train --method mm", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "rayclip" in bash("rayclip", _RAYCLIP_COMPLETE=f"source_{shell}")
    assert "mmcoa" in " ".join(bash("rayclip", _RAYCLIP_COMPLETE=f"complete_{shell}", **asked))


def test_completion_is_quick_and_loads_nothing_heavy():
    asked = {"_RAYCLIP_COMPLETE": "complete_bash", "COMP_WORDS": "rayclip eval --attacks p", "COMP_CWORD": "3"}
    command = [sys.executable, "-X", "importtime", "-m", "rayclip"]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(command, env={**ENVIRONMENT, **asked}, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - began)
    assert done.stdout.split() == ["pgd", "pgd-l2"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rayclip.names" in imported and not imported & {"torch", "numpy", "ray", "mlflow", "rich.console"}
    assert best < 1.0

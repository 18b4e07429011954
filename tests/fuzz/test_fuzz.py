"""Damaged and hostile files of every kind are refused in one sentence or read rightly: no crash, nothing is written or
opened outside of the folder, no program is run, and no file takes more than 1 GB or 20 seconds.

A process of its own reads them (`run.py`), first those of `corpus.jsonl`, which once were faults.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fuzz.kinds import KINDS
from fuzz.run import CORPUS

LEAST = 0.02  # share of the files that are still read, and of those that are refused


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(25, marks=pytest.mark.ci),
        pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    # Arrow's and glibc's arenas would count as address space
    quiet = {
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-m", "fuzz.run", str(request.param)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **quiet, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["kind"]: line for line in map(json.loads, done.stdout.splitlines())}
    return {"count": request.param, **found}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_refused_or_read_rightly(outcomes, kind):
    found = outcomes[kind]
    assert found["found"] == {}
    assert found["cases"] >= 0.9 * outcomes["count"]
    assert min(found["refused"], found["read"]) >= LEAST * found["cases"], "both outcomes are met"


def test_the_corpus_holds_files_of_known_forms():
    forms = {(name, form.file) for name, kind in KINDS.items() for form in kind.forms}
    kept = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    assert kept and {(case["kind"], case["file"]) for case in kept} <= forms

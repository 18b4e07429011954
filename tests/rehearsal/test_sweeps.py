"""Every file in `sweeps/` at the papers' scale on miniatures: to its table, its report and its runs in MLflow.

    pytest -m slow tests/rehearsal                           # all of them; some minutes
    RAYCLIP_REHEARSAL=1 pytest -m today tests/rehearsal      # a third of them: 0, 1 or 2, by default the day's

Only model, shots, epochs and the number of tested images are small, and by options that users have.
"""

import datetime
import importlib.util
import inspect
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from calling import run_here
from rayclip.data.registry import MMCOA_15, ZERO_SHOT_16
from rayclip.distributed.connect import ray_cluster
from rehearsal import miniatures

SWEEPS = sorted((Path(__file__).resolve().parents[2] / "sweeps").glob("*.py"))
TODAY = int(os.environ.get("RAYCLIP_REHEARSAL", datetime.date.today().timetuple().tm_yday)) % 3
LIMIT = 2
# Shots that miniatures have where the papers' scale has others; other options that are expensive
SMALL = {
    "mmcoa_shots": ["--shots", "1,2,full"],
    "mmcoa_co_attack": ["--shots", "1,2"],
    "mmcoa_partial": ["--shots", "1,full"],
    "mmcoa_iterations": ["--shots", "2"],
    "joint_search": ["--shots", "1,full", "--samples", "4"],
    "saft_scorers": ["--crops", "4"],
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[miniatures.Miniatures]:
    """The miniatures, and a Ray that all sweeps share, with the checkpoints that they have in common."""
    made = miniatures.make(tmp_path_factory.mktemp("miniatures"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYCLIP_DATA", str(made.data))
        with ray_cluster():
            yield made


def own_options(sweep: Path, made: miniatures.Miniatures) -> list[str]:
    """The options without which a sweep cannot begin at the papers' scale."""
    spec = importlib.util.spec_from_file_location(sweep.stem, sweep)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {
        "captions": made.captions,
        "sources": f"{made.captions}/tiny_imagenet.parquet,templates",
        "epochs": "1",
        "substitutes": made.language_model,
    }
    options = inspect.signature(module.main).parameters
    return [text for name, value in given.items() if name in options for text in (f"--{name}", value)]


@pytest.mark.parametrize(
    "sweep",
    [pytest.param(f, marks=[pytest.mark.today] * (i % 3 == TODAY), id=f.stem) for i, f in enumerate(SWEEPS)],
)
def test_a_sweep_of_the_papers_scale_reaches_its_end(sweep: Path, made: miniatures.Miniatures, mlflow_uri: str) -> None:
    out = made.folder / sweep.stem
    options = ["--scale", "paper", "--model", made.model, "--limit", LIMIT, "--out", out, "--quiet"]
    options += ["--models", made.folder / "models", "--tracking-uri", mlflow_uri]
    options += [*own_options(sweep, made), *SMALL.get(sweep.stem, [])]
    began = time.perf_counter()
    done = run_here(made.folder, *options, program=sweep)
    print(f"{sweep.stem}: {time.perf_counter() - began:.0f} s")
    print(done.stdout[-3000:], done.stderr[-3000:])

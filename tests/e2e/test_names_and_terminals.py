"""Whole commands where names, terminals and folders are not what a developer has."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from conftest import tiny_clip
from data.test_data import png, write
from rayclip.models.checkpoint import save_checkpoint

pytestmark = pytest.mark.e2e
RAYCLIP = [sys.executable, "-m", "rayclip"]
MODELS = ["tecoa[eps=1]", "tecoa[eps=4]", "x[/b]"]


def test_names_with_brackets_and_accents_are_whole_on_a_latin_terminal_and_in_mlflow(tmp_path):
    save_checkpoint(tiny_clip(), tmp_path / "model", {})
    for i, name in enumerate(MODELS):
        save_checkpoint(tiny_clip(i), tmp_path / name, {})
    for name in ("té st", "tè st"):
        write(tmp_path / f"{name}.parquet", [0, 1, 2, 0], [png(c, (8, 8)) for c in ("red", "green", "blue", "white")])
    command = [*RAYCLIP, "eval", "--attacks", "clean,pgd", "--steps", "1", "--eps", "8/255", "--out", "out"]
    command += [part for name in MODELS for part in ("--model", f"local-dir:{name}")]
    command += ["--data", "té st.parquet,tè st.parquet", "--local", "--json", "rows.json"]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "COLUMNS": "100"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    said = done.stderr.decode("latin-1")
    assert done.returncode == 0, said
    assert "MLflow" not in said, "nothing is refused"
    table = done.stdout.decode("latin-1")
    assert all(table.count(f"local-dir:{name}") == 3 for name in MODELS), "on both data sets and their average"
    assert "té st: accuracy in %" in table and "results: out" in table
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["dataset"] for row in rows} == {"té st", "tè st"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("rayclip-eval").experiment_id])
    assert {run.info.run_name for run in runs} == {f"eval local-dir:{name}" for name in MODELS}
    for run in runs:
        mine = {
            r["dataset"]: r["top1"] for r in rows if (f"eval {r['model']}", r["attack"]) == (run.info.run_name, "clean")
        }
        assert {name: run.data.metrics[f"clean/{name}"] for name in mine} == mine
        pictures = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
        assert len({path.split("-")[1] for path in pictures}) == 2, "a picture of each data set"

    again, environment["PYTHONIOENCODING"] = [*command[:-2], "--json", "-"], "ascii"
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == rows


def test_the_doctor_says_all_that_is_wrong_and_survives_it(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    (tmp_path / "pyarrow.py").write_text("raise RuntimeError('imported from the working directory')\n")
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONIOENCODING": "latin-1"}
    program = shutil.which("rayclip", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("the program rayclip is not installed")
    long = tmp_path / ("a_rather_long_directory_name_of_a_cluster_job/" * 3)
    long.mkdir(parents=True)
    env = environment | {"TMPDIR": str(long)}
    done = subprocess.run([program, "doctor"], cwd=tmp_path, env=env, capture_output=True, check=False)
    out = done.stdout.decode("latin-1")
    assert done.returncode == 1 and done.stderr == b"", done.stderr
    topics = [line.split()[1] for line in out.splitlines()]
    assert {"rayclip", "libraries", "GPU", "Ray", "MLflow", "data", "disk"} <= set(topics)
    assert "is none, or damaged: move it away" in out and "pyarrow.py bears the name of a library" in out
    # As a module Python looks in the working directory first, and every check that reads a table meets it
    done = subprocess.run(
        [*RAYCLIP, "doctor", "--json"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert {f["topic"] for f in found} >= {"rayclip", "libraries", "GPU", "Ray", "MLflow", "data", "disk"}
    assert any("is imported in the place of the installed pyarrow, rename it" in f["says"] for f in found)

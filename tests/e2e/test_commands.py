"""Whole commands in their own processes, on a real Ray and a real MLflow."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from calling import run_here
from rayclip.models import load_model
from servers import wait_for

pytestmark = pytest.mark.e2e
NO_RAY = {"RAY_ADDRESS": "127.0.0.1:9"}  # nobody listens there
RAYCLIP = [sys.executable, "-m", "rayclip"]
IMAGES = 160  # of each attack
ATTACK = ["--data", "digits", "--attacks", "clean,pgd,bert,sep", "--eps", "32/255", "--steps", "5"]
ATTACK += ["--limit", str(IMAGES)]


def run(cwd, *args, check=True, program=RAYCLIP, **env):
    done = subprocess.run([*map(str, [*program, *args])], cwd=cwd, capture_output=True, text=True, env=os.environ | env)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def verdicts(out):
    """sample -> (prediction before, after, steps) for every cell."""
    found = {}
    for file in Path(out).glob("cells/*/*.parquet"):
        for r in pq.read_table(file).to_pylist():
            key = file.parent.name, r["sample_id"]
            assert key not in found, "no sample is counted twice"
            found[key] = r["clean_pred"], r["adv_pred"], r["steps"]
    return found


def kill_tree(process):
    """SIGKILL the driver and what it started in its process group; a private Ray ends with its driver."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def logged(done):
    """What a command said with `--json-logs`, which is all that it writes to standard error."""
    return [json.loads(line) for line in done.stderr.splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An undisturbed evaluation on one worker: its folder, and what the command said."""
    cwd = tmp_path_factory.mktemp("reference")
    options = ["--out", "r", "--workers", 1, "--shard-size", 64, "--json", "rows.json", "--json-logs"]
    return cwd, run(cwd, "eval", "--model", "digits", *ATTACK, *options)


@pytest.fixture
def reference(evaluated):
    return evaluated[0]


def test_rows_have_what_readers_need(reference):
    rows = json.loads((reference / "rows.json").read_text())
    assert [r["attack"] for r in rows] == ["clean", "pgd-5_eps32", "bert", "sep_pgd-5_eps32", "worst"]
    for r in rows:
        assert {"model", "dataset", "attack", "eps", "steps", "n", "top1", "ci_low", "ci_high", "protocol"} <= set(r)
        assert r["n"] == IMAGES and 0 <= r["ci_low"] <= r["top1"] <= r["ci_high"] <= 100
    assert rows[0]["top1"] >= 95 and rows[1]["top1"] <= 20
    assert rows[2]["protocol"]["substitutes"] == "clip-table"


@pytest.mark.slow
def test_a_killed_evaluation_on_two_workers_in_other_shards_goes_on_to_the_same_verdicts(reference, tmp_path):
    command = ["eval", "--model", "digits", *ATTACK, "--out", "r", "--workers", "2", "--shard-size", "10"]
    command.append("--no-tracking")
    process = subprocess.Popen([*RAYCLIP, *command], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("r/cells/*/*.parquet"))) >= 12)
    kill_tree(process)
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("r/cells/*/*.parquet")}
    assert 12 <= len(kept) < 4 * IMAGES / 10
    run_here(tmp_path, *command)
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items()), "what was done is not done again"
    assert verdicts(tmp_path / "r") == verdicts(reference / "r")
    run_here(tmp_path, *command, "--cluster", **NO_RAY)  # a finished evaluation does not even ask for Ray


@pytest.fixture
def without_ray(tmp_path):
    """An environment in which importing Ray or MLflow is an error."""
    for name in ("ray", "mlflow"):
        (tmp_path / "none" / name).mkdir(parents=True)
        (tmp_path / "none" / name / "__init__.py").write_text("raise ImportError('not here')\n")
    return {"PYTHONPATH": f"{tmp_path / 'none'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_verdicts_without_ray_are_those_of_actors_and_each_goes_on_with_the_others(
    reference,
    tmp_path,
    without_ray,
):
    wanted, place = verdicts(reference / "r"), tmp_path / "r"
    shutil.copytree(reference / "r", place)
    by_actors = sorted(place.glob("cells/*/*.parquet"))
    for path in by_actors[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in by_actors[1::2]}
    shutil.rmtree(place / "answers", ignore_errors=True)
    command = ["eval", "--model", "digits", *ATTACK, "--out", "r", "--no-tracking", "--quiet"]
    run(tmp_path, *command, "--local", "--shard-size", 50, **without_ray)
    assert verdicts(place) == wanted
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what actors have done is not done again"
    for path in kept:
        path.unlink()
    here = {path: path.stat().st_mtime_ns for path in place.glob("cells/*/*.parquet")}
    shutil.rmtree(place / "answers", ignore_errors=True)
    run(tmp_path, *command, "--workers", 1)
    assert verdicts(place) == wanted
    assert {path: path.stat().st_mtime_ns for path in here} == here, "nor what this process has"


TRAIN = [
    "train",
    "--method",
    "mmcoa",
    "--model",
    "digits",
    "--data",
    "digits",
    "--shots",
    "5",
    "--eps",
    "32/255",
    "--steps",
    "2",
    "--batch-size",
    "16",
]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """An undisturbed run: its folder, and what the command said."""
    cwd = tmp_path_factory.mktemp("trained")
    return cwd, run(cwd, *TRAIN, "--epochs", 12, "--out", "model", "--precision", "fp32", "--json-logs")


@pytest.fixture
def trained(training):
    return training[0]


def curve(cwd, name="model"):
    client = MlflowClient(f"sqlite:///{cwd}/mlflow.db")
    experiment = client.get_experiment_by_name("rayclip-train").experiment_id
    runs = client.search_runs([experiment], f"run_name = '{name}'")
    assert len(runs) == 1
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    return runs[0], {m.step: m.value for m in history}


def test_a_checkpoint_is_what_open_clip_loads(trained):
    spec = f"local-dir:{trained / 'model'}"
    plain, _, preprocess = open_clip.create_model_and_transforms(spec)
    ours, pixels, texts = load_model(spec), torch.rand(4, 3, 8, 8), ["This is a photo of a seven", "a cat"]
    with torch.no_grad():
        theirs = plain.eval().encode_image(preprocess.transforms[-1](pixels), normalize=True)
        assert torch.allclose(ours.encode_image(pixels), theirs, atol=1e-6)
        tokens = open_clip.get_tokenizer(spec)(texts)
        assert torch.allclose(ours.embed_texts(texts), plain.encode_text(tokens, normalize=True), atol=1e-6)
    assert ours.fingerprint() != load_model("digits").fingerprint()
    lineage = json.loads((trained / "model" / "rayclip.json").read_text())
    assert lineage["config"]["method"]["name"] == "mmcoa" and lineage["data"]["images"] == 50
    assert {p.name for p in (trained / "model").iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "rayclip.json",
        ".rayclip",
    }


def test_a_training_run_is_in_mlflow(trained, tmp_path):
    found, losses = curve(trained)
    assert found.info.status == "FINISHED" and sorted(losses) == list(range(1, 49))
    assert found.data.params["method.name"] == "mmcoa" and found.data.params["shots"] == "5"
    client = MlflowClient(f"sqlite:///{trained}/mlflow.db")
    files = {f.path for f in client.list_artifacts(found.info.run_id, "checkpoint/data")}
    assert "checkpoint/data/open_clip_model.safetensors" in files
    drawn = json.loads(Path(client.download_artifacts(found.info.run_id, "data/drawn.json", str(tmp_path))).read_text())
    assert [len(c["ids"]) for c in drawn["ids"]] == [5] * 10 and drawn["data"] == "digits"


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(trained):
    assert "nothing to do" in run_here(trained, *TRAIN, "--epochs", 12, "--out", "model", "--precision", "fp32").stdout
    other = run_here(trained, *TRAIN, "--epochs", 13, "--out", "model", "--precision", "fp32", check=False)
    assert other.returncode == 2 and "other settings" in other.stderr


def test_a_killed_training_resumes_on_the_same_curve(trained, tmp_path):
    command = [*TRAIN, "--epochs", "12", "--out", "model", "--precision", "fp32"]
    process = subprocess.Popen([*RAYCLIP, *command], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    unfinished = tmp_path / "model" / ".rayclip" / "unfinished"
    wait_for(lambda: any(unfinished.glob("train-*/checkpoint_*/rayclip.json")))  # written last
    kill_tree(process)
    assert not (tmp_path / "model" / "rayclip.json").exists(), "it must be killed before the end"
    time.sleep(2)
    run_here(tmp_path, *command)
    _, losses = curve(tmp_path)
    _, expected = curve(trained)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert (
        load_model(f"local-dir:{tmp_path / 'model'}").fingerprint()
        == load_model(f"local-dir:{trained / 'model'}").fingerprint()
    )
    assert not list(unfinished.glob("train-*"))


@pytest.mark.slow
def test_two_train_workers_follow_one_workers_curve(trained, tmp_path):
    run_here(tmp_path, *TRAIN, "--epochs", 12, "--out", "model", "--precision", "fp32", "--workers", 2)
    _, losses = curve(tmp_path)
    _, expected = curve(trained)
    assert sorted(losses) == sorted(expected)
    early = {s: losses[s] for s in itertools.islice(sorted(losses), 5)}
    assert early == pytest.approx({s: expected[s] for s in early}, rel=1e-3)


def answers(address):
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except OSError:
        return False
    return True


def test_the_ui_opens_at_the_experiment(trained, free_port):
    process = subprocess.Popen(
        [*RAYCLIP, "ui", "--experiment", "rayclip-train", "--no-browser", "--port", str(free_port)],
        cwd=trained,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        line = ""
        while not line.startswith("MLflow:"):
            line = process.stdout.readline()
            assert line or process.poll() is None
        client = MlflowClient(f"sqlite:///{trained}/mlflow.db")
        expected = client.get_experiment_by_name("rayclip-train").experiment_id
        at = f"http://127.0.0.1:{free_port}/#/experiments/{expected}/runs?workflowType=machine_learning"
        assert line.startswith(f"MLflow: {at}&viewStateShareKey=rayclip")
        assert answers(f"http://127.0.0.1:{free_port}/health")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_the_doctor_starts_a_ray_and_changes_nothing(tmp_path):
    found = {each["topic"]: each for each in json.loads(run_here(tmp_path, "doctor", "--json").stdout)}
    assert set(found) == {"rayclip", "libraries", "GPU", "Ray", "MLflow", "data", "disk"}
    assert found["Ray"]["state"] == "ok" and "a private one starts: 1 node" in found["Ray"]["says"]
    assert list(tmp_path.iterdir()) == []


def test_json_logs_are_all_that_a_command_writes_to_standard_error(evaluated, training):
    last = [each for each in logged(evaluated[1]) if each["level"] == "progress"][-1]
    assert (last["completed"], last["total"], last["seconds_left"]) == (4 * IMAGES, 4 * IMAGES, 0)
    last = [each for each in logged(training[1]) if each["level"] == "progress"][-1]
    assert (last["task"], last["completed"]) == ("model", 48)

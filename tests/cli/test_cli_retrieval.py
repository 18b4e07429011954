"""`rayclip retrieval` in this process."""

import errno
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from calling import call
from conftest import tiny_clip
from data.test_data import write
from data.test_pairs import CAPTIONS, write_pairs
from rayclip.api.logbook import Logbook
from rayclip.evaluation import retrieval
from rayclip.models.checkpoint import save_checkpoint


@pytest.fixture
def here(tmp_path, monkeypatch):
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYCLIP_DATA", str(inputs / "none"))
    write_pairs(inputs / "pairs.parquet", CAPTIONS)
    write_pairs(inputs / "null.parquet", [["a"], None])
    write(inputs / "labels.parquet", [0, 1, 2])
    for seed in (0, 1):
        save_checkpoint(tiny_clip(seed), inputs / f"model{seed}", {})
    return inputs


def test_one_table_once(here, monkeypatch, capsys):
    args = ["retrieval", "--data", here / "pairs.parquet", "--out", "out", "--no-tracking", "--json", "rows.json"]
    args += ["--model", f"local-dir:{here}/model0", "--model", f"local-dir:{here}/model1"]
    code, out, err = call(monkeypatch, capsys, *args)
    assert code == 0
    assert "n = 5 images (TR) and 8 captions" in out and all(
        f"{d}@{k}" in out for d in ("TR", "IR") for k in (1, 5, 10)
    )
    assert "13/13" in err and "13/13" not in out
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == 12 and {r["model"] for r in rows} == {f"local-dir:{here}/model{i}" for i in (0, 1)}
    assert all(r["ci_low"] <= r["recall"] <= r["ci_high"] for r in rows)
    files = sorted(Path("out/retrieval").glob("*.json"))
    assert len(files) == 2 and {f.stem for f in files} == {r["result"] for r in rows}

    before = [(f, f.stat().st_mtime_ns) for f in files]
    monkeypatch.setattr(retrieval, "embed_pairs", lambda *a, **k: pytest.fail("computed again"))
    code, again, err = call(monkeypatch, capsys, *args)
    assert (code, again, err) == (0, out, "")
    assert [(f, f.stat().st_mtime_ns) for f in sorted(Path("out/retrieval").glob("*.json"))] == before


def test_limit_quiet_and_rows_to_standard_output(here, monkeypatch, capsys):
    args = ["--data", here / "pairs.parquet", "--out", "out", "--no-tracking", "--limit", 2, "--quiet", "--json", "-"]
    code, out, err = call(monkeypatch, capsys, "retrieval", "--model", f"local-dir:{here}/model0", *args)
    assert (code, err) == (0, "")
    assert {(r["direction"], r["n"]) for r in json.loads(out)} == {("tr", 2), ("ir", 5)}, "rows 0 and 2"


def test_metrics_reach_mlflow_once(here, monkeypatch, capsys):
    uri = f"sqlite:///{Path('mlflow.db').absolute()}"
    args = ["retrieval", "--model", f"local-dir:{here}/model0", "--data", here / "pairs.parquet", "--out", "out"]
    for _ in range(2):
        assert call(monkeypatch, capsys, *args, "--tracking-uri", uri)[0] == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("rayclip-retrieval")
    (run,) = client.search_runs([experiment.experiment_id])
    names = {f"clean/{d}_at_{k}/pairs" for d in ("tr", "ir") for k in (1, 5, 10)}
    assert set(run.data.metrics) == names and run.info.status == "FINISHED"
    assert run.data.params["retrieval.images"] == "5"


def test_attacks_are_rows_and_a_second_run_only_prints(here, monkeypatch, capsys):
    args = ["retrieval", "--model", f"local-dir:{here}/model0", "--data", here / "pairs.parquet", "--out", "out"]
    args += ["--attacks", "clean,bert,pgd,sep,co-attack:steps=2,sga", "--eps", "2/255", "--steps", "3"]
    args += ["--substitutes", "clip-table", "--no-tracking", "--json", "rows.json"]
    code, out, err = call(monkeypatch, capsys, *args)
    assert code == 0 and "co-attack-2_eps2 13/13" in err
    names = ["clean", "bert", "pgd-3_eps2", "sep_pgd-3_eps2", "co-attack-2_eps2", "sga-3_eps2"]
    rows = json.loads(Path("rows.json").read_text())
    assert [r["attack"] for r in rows] == [name for name in names for _ in range(6)]
    steps = {r["attack"]: (r["protocol"]["step"], r["protocol"]["stop"]) for r in rows if "step" in r["protocol"]}
    own = steps.pop("co-attack-2_eps2")
    assert own == ("1.25/255", "final") and set(steps.values()) == {("0.8333/255", "final")}, "1.25·eps/steps"
    assert all(name.split("_eps")[0].replace("_", " ") in " ".join(out.split()) for name in names)
    assert "on pairs: recall in %" in " ".join(out.split())

    before = [(f, f.stat().st_mtime_ns) for f in sorted(Path("out").rglob("*.json"))]
    monkeypatch.setattr(retrieval, "embed_pairs", lambda *a, **k: pytest.fail("computed again"))
    assert call(monkeypatch, capsys, *args) == (0, out, "")
    assert [(f, f.stat().st_mtime_ns) for f in sorted(Path("out").rglob("*.json"))] == before


def test_attacked_metrics_have_names_of_their_own(here, monkeypatch, capsys):
    uri = f"sqlite:///{Path('mlflow.db').absolute()}"
    args = ["retrieval", "--model", f"local-dir:{here}/model0", "--data", here / "pairs.parquet", "--out", "out"]
    args += ["--attacks", "clean,pgd", "--eps", "2/255", "--tracking-uri", uri]
    assert call(monkeypatch, capsys, *args)[0] == 0
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("rayclip-retrieval").experiment_id])
    named = {run.info.run_name: set(run.data.metrics) for run in runs}
    model = f"retrieval local-dir:{here}/model0"
    assert (
        "clean/tr_at_1/pairs" in named[model] and "robust/pgd-10_eps2/ir_at_10/pairs" in named[f"{model} pgd-10_eps2"]
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--data": "{i}/labels.parquet"}, "has no captions"),
        ({"--data": "{i}/null.parquet"}, "row 1 of"),
        ({"--data": "{i}/missing.parquet"}, "no such data file"),
        ({"--data": "mscoco"}, "no image-caption data 'mscoco'"),
        ({"--resolution": "native"}, "--resolution model"),
        ({"--resolution": "huge"}, "'native', 'model'"),
        ({"--resize": "plain"}, "choose --resolution native"),
        ({"--limit": "0"}, "--limit"),
        ({"--model": "resnet50"}, "unknown model 'resnet50'"),
        ({"--model": None}, "Missing option '--model'"),
        ({"--json": "no/folder/rows.json"}, "there is no folder"),
        ({"--out": "{i}/null.parquet"}, "is a file"),
        ({"--attacks": "clean,pgd"}, "give --eps"),
        ({"--attacks": "pgd", "--eps": "2"}, "2/255"),
        ({"--attacks": "pgd:stop=first_success", "--eps": "2/255"}, "use stop=final"),
        ({"--attacks": "coattack", "--eps": "2/255"}, "unknown attack 'coattack'"),
        ({"--attacks": "co-attack:k=0", "--eps": "2/255"}, "must be at least 1"),
        ({"--attacks": "bert", "--substitutes": "/no/such/model"}, "substitutes=clip-table"),
        ({"--attacks": "pgd", "--eps": "2/255", "--step-size": "1"}, "1/255"),
        ({"--attacks": ""}, "empty name"),
    ],
)
def test_bad_arguments_get_one_sentence_and_leave_nothing(here, monkeypatch, capsys, changes, says):
    options = {"--model": "local-dir:{i}/model0", "--data": "{i}/pairs.parquet", "--out": "out"} | changes
    args = [part.format(i=here) for k, v in options.items() if v is not None for part in (k, v)]
    code, out, err = call(monkeypatch, capsys, "retrieval", *args)
    assert code == 2 and says in err and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert list(Path.cwd().iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (TypeError("of nobody's making"), 0, "warning: not all could be logged (TypeError: of nobody's making)"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: a file cannot be written or read (No space"),
    ],
)
def test_results_are_there_whatever_becomes_of_the_log(here, monkeypatch, capsys, error, code, says):
    def fails(*_):
        raise error

    monkeypatch.setenv("COLUMNS", "300")  # so that no name is broken
    (here / "model[0]").mkdir()
    save_checkpoint(tiny_clip(), here / "model[0]", {})
    args = ["retrieval", "--data", here / "pairs.parquet", "--out", "out", "--no-tracking", "--quiet"]
    args += ["--model", f"local-dir:{here}/model[0]"]
    monkeypatch.setattr(Logbook, "retrieval", fails)
    found, out, err = call(monkeypatch, capsys, *args)
    assert found == code and says in err and "Traceback" not in err
    assert len(list(Path("out/retrieval").glob("*.json"))) == 1
    assert code or ("model[0]" in out and "results: out" in out)

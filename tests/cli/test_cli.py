"""The command line: instant help, and one clear sentence with exit code 2 for whatever cannot work."""

import json
import os
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import typer

from calling import call
from conftest import tiny_clip
from data.test_data import png, write
from rayclip.cli.app import app as rayclip_app
from rayclip.models.checkpoint import save_checkpoint


def test_help_is_instant():
    command = [sys.executable, "-m", "rayclip", "--help"]
    subprocess.run(command, check=True, capture_output=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5, "seconds of a core"
    assert all(word in done.stdout for word in ("eval", "train", "ui"))


@pytest.fixture
def here(tmp_path, tmp_path_factory, monkeypatch):
    """A folder of good and bad inputs, which no test changes; the working directory is another, an empty one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return inputs_below(tmp_path_factory.getbasetemp())


@cache
def inputs_below(folder):
    inputs = Path(mkdtemp(dir=folder))
    write(inputs / "good.parquet", [0, 1, 2] * 3)
    write(inputs / "unnamed.parquet", [0, 1], names=None)
    write(inputs / "nolabel.parquet", ["a", "b"], label_type="string")
    write(inputs / "mixed.parquet", [0, 1, 2], [png("red", (20, 10)), *[png("blue", (10, 10))] * 2])
    save_checkpoint(tiny_clip(), inputs / "model", {})
    save_checkpoint(tiny_clip(), inputs / "shape", {})
    config = json.loads((inputs / "shape" / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 24
    (inputs / "shape" / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(tiny_clip(1).model.visual.state_dict(), inputs / "tower.pt")
    torch.save({"vision_encoder_state_dict": _Evil()}, inputs / "evil.pt")
    return inputs


class _Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


EVAL = {"--model": "local-dir:{i}/model", "--data": "{i}/good.parquet", "--out": "out", "--eps": "1/255"}
TRAIN = EVAL | {"--method": "tecoa", "--eps": "1/255"}
MIX = {"--from": "local-dir:{i}/model", "--to": "local-dir:{i}/model"} | {k: EVAL[k] for k in EVAL if k != "--model"}
IMPORT = {"--allow-gelu": "{i}/tower.pt", "--base": "local-dir:{i}/model", "--out": "out"}


@pytest.mark.parametrize(
    ("command", "changes", "says"),
    [
        ("eval", {"--eps": "8"}, "8/255"),
        ("eval", {"--eps": "eight"}, "is not a number"),
        ("eval", {"--eps": None}, "give --eps"),
        ("eval", {"--step-size": "2"}, "2/255"),
        ("eval", {"--model": "resnet50"}, "unknown model 'resnet50'"),
        ("eval", {"--model": "local-dir:{i}/nothing"}, "there is no folder"),
        ("eval", {"--model": "local-dir:{i}/shape"}, "do not fit"),
        ("eval", {"--data": "{i}/missing.parquet"}, "no such data file"),
        ("eval", {"--data": "{i}/nolabel.parquet"}, "name no class: the label 'a'"),
        ("eval", {"--data": "{i}/unnamed.parquet"}, "names no classes"),
        ("eval", {"--data": "{i}/mixed.parquet"}, "--resolution model"),
        ("train", {"--data": "{i}/mixed.parquet"}, "--resolution model"),
        ("eval", {"--resolution": "model", "--resize": "plain"}, "leave --resize away"),
        ("train", {"--resolution": "model", "--resize": "plain"}, "leave --resize away"),
        ("eval", {"--resize": "bicubic"}, "'antialias', 'plain'"),
        ("eval", {"--data": ","}, "no data set is named"),
        ("eval", {"--data": "cifar11"}, "no data set or file 'cifar11'"),
        ("eval", {"--data": "imagenet"}, "is not prepared"),
        ("eval", {"--data": "{i}/good.parquet,{i}/good.parquet"}, "share the name 'good'"),
        ("eval", {"--attacks": "clean,pdg"}, "unknown attack 'pdg'"),
        ("eval", {"--attacks": "pgd:stepz=3"}, "no setting 'stepz'"),
        ("eval", {"--attacks": "bert", "--substitutes": "/no/model"}, "substitutes=clip-table"),
        ("eval", {"--limit": "0"}, "Invalid value for '--limit'"),
        ("eval", {"--json": "no/folder/rows.json"}, "there is no folder"),
        ("eval", {"--out": "{i}/good.parquet"}, "is a file"),
        ("eval", {"--bogus": "1"}, "--bogus"),
        ("eval", {"--model": None}, "Missing option '--model'"),
        ("plan", {"--eps": None}, "give --eps"),
        ("plan", {"--out": "{i}/good.parquet"}, "is a file"),
        ("plan", {"--workers": "4,none"}, "write 8, or 1,8,64"),
        ("plan", {"--price": "-1"}, "Invalid value for '--price'"),
        ("plan", {"--calibrate": "0"}, "let --calibrate measure"),
        ("train", {"--method": "tecoo"}, "unknown method 'tecoo'"),
        ("train", {"--eps": "8"}, "8/255"),
        ("train", {"--shots": "7"}, "--shots 7 is more than class 'cat' of 'good' has (3 images)"),
        ("train", {"--shots": "some"}, "write 1, 5 or full"),
        ("train", {"--model": "local-dir:{i}/shape"}, "do not fit"),
        ("train", {"--data": "{i}/nolabel.parquet"}, "name no class: the label 'a'"),
        ("train", {"--method": "mmcoa", "--substitutes": "/no/model"}, "substitutes=clip-table"),
        ("train", {"--method": "mmcoa:lambda_img=0,lambda_txt=0"}, "no loss"),
        ("train", {"--method": "saft"}, "saft:captions=templates"),
        ("train", {"--method": "saft:captions=none.csv"}, "no such file of captions: none.csv"),
        ("train", {"--method": "saft:captions=digits"}, "has captions of 'zero' as class 0, which is"),
        ("train", {"--method": "fare", "--trains": "all"}, "fare knows no texts"),
        ("train", {"--method": "tecoa:tokens"}, "write KEY=VALUE"),
        ("train", {"--method": "tecoa:tokens=10"}, "method 'tecoa' has no setting 'tokens'"),
        ("train", {"--workers": "9", "--batch-size": "4"}, "3 images of 9, which cannot be dealt out to 9 workers"),
        ("train", {"--lr": "-1"}, "--lr -1.0 must be a positive number"),
        ("train", {"--betas": "0.9"}, "--betas '0.9' are not two numbers from 0 to below 1"),
        ("train", {"--betas": "0.9,1"}, "write 0.9,0.98"),
        ("train", {"--momentum": "1.5"}, "Invalid value for '--momentum'"),
        ("train", {"--schedule": "step"}, "'cosine', 'linear', 'constant'"),
        ("train", {"--norm": "l1"}, "'linf', 'l2'"),
        ("train", {"--start": "one"}, "'random', 'zero'"),
        ("train", {"--eps-warmup": "9", "--epochs": "8"}, "eps-warmup 9 does not fit into a run of 8 epochs"),
        ("train", {"--eps-warmup": "-1"}, "write a number of epochs from 0"),
        ("train", {"--ema": "1"}, "ema 1 is no decay"),
        ("train", {"--seed": "0,0"}, "names one twice"),
        ("train", {"--validate": "each=1"}, "write every=1"),
        ("train", {"--validate": "attacks=bert"}, "bert changes texts"),
        ("train", {"--trains": "lora:depth=2"}, "write lora:rank=8"),
        ("train", {"--accumulate": "0"}, "Invalid value for '--accumulate'"),
        ("train", {"--method": "advpt", "--trains": "image"}, "leave --trains away"),
        ("train", {"--method": "vp", "--model": "prompted:{i}/model"}, "holds no learned prompt"),
        ("train", {"--method": "advpt", "--eps-warmup": "1"}, "leave --eps-warmup away"),
        ("train", {"--optimizer": "lion"}, "'sgd', 'adam', 'adamw'"),
        ("train", {"--trains": "last-3"}, "has 2 transformer blocks"),
        ("train", {"--trains": "words"}, "all, image, text, or last-N"),
        ("train", {"--workers": "12"}, "9 training images cannot be dealt out to 12 workers"),
        ("train", {"--out": "{i}/good.parquet"}, "is a file"),
        ("train", {"--out": "{i}/good.parquet/below"}, "is a file"),
        ("train", {"--tracking-uri": "http://127.0.0.1:9"}, "cannot be reached"),
        ("train", {"--out": "{i}/model"}, "holds a checkpoint of other settings"),
        ("ui", {"--experiment": "x"}, "there is no MLflow store"),
        ("interpolate", {"--a": "0,half"}, "--a 0,half holds something else"),
        ("interpolate", {"--a": "0,2"}, "from 0 to 1"),
        ("interpolate", {"--to": "digits"}, "differ in architecture"),
        ("interpolate", {"--from": "resnet50"}, "unknown model 'resnet50'"),
        ("interpolate", {"--eps": None}, "give --eps"),
        ("interpolate", {"--json": "no/folder/rows.json"}, "there is no folder"),
        ("interpolate", {"--out": "{i}/good.parquet"}, "is a file"),
        ("import", {"--allow-gelu": "{i}/evil.pt"}, "is refused: reading it would call posix.system"),
        ("import", {"--allow-gelu": "{i}/good.parquet"}, "no file of weights"),
        (
            "import",
            {"--base": "digits"},
            "does not fit --base digits",
        ),
        ("import", {"--base": None}, "--base is missing"),
        ("import", {"--out": "{i}/good.parquet"}, "is a file"),
        (
            "import",
            {"--out": "{i}/model"},
            "holds another checkpoint",
        ),
    ],
)
def test_bad_arguments_get_one_sentence_and_leave_nothing(here, monkeypatch, capsys, command, changes, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    options = {"eval": EVAL, "plan": EVAL, "train": TRAIN, "ui": {}, "interpolate": MIX, "import": IMPORT}[
        command
    ] | changes
    args = [part.format(i=here) for k, v in options.items() if v is not None for part in (k, v)]
    before = sorted(p for p in here.rglob("*"))
    code, out, err = call(monkeypatch, capsys, command, *args)
    assert code == 2
    assert says in err and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    assert list(Path.cwd().iterdir()) == [], "nothing is written"
    assert sorted(p for p in here.rglob("*")) == before


def test_import_writes_a_checkpoint_once(here, monkeypatch, capsys):
    command = ["import", here / "tower.pt", "--base", f"local-dir:{here}/model", "--allow-gelu", "--out", "out"]
    code, out, _ = call(monkeypatch, capsys, *command)
    assert code == 0 and "the image tower" in out and "rayclip eval --model local-dir:out" in out
    written = (Path("out") / "open_clip_model.safetensors").stat().st_mtime_ns
    code, out, _ = call(monkeypatch, capsys, *command)
    assert code == 0 and "nothing to do" in out
    assert (Path("out") / "open_clip_model.safetensors").stat().st_mtime_ns == written


def test_plan_takes_whatever_eval_takes(monkeypatch, capsys):
    helps = [call(monkeypatch, capsys, command, "--help")[1] for command in ("eval", "plan")]
    options = [set(re.findall(r"--[a-z-]+", text)) for text in helps]
    options[0].remove("--local")  # which has nothing to plan
    assert {"--gpus-per-worker", "--defense", "--cluster", "--workers"} < options[0] < options[1]
    assert options[1] - options[0] == {"--price", "--calibrate"}


def test_version(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--version")
    assert code == 0 and out.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["eval", "--model", "digits", "--data", "digits", "--out", "out", "--eps", "eight"], "is not a number"),
        (["eval", "--nonsense"], "No such option"),
        (["data", "prepare", "no-such-set"], "no-such-set"),
    ],
)
def test_errors_are_json_too(tmp_path, args, says):
    command = [sys.executable, "-m", "rayclip", *args, "--json-logs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (error,) = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, done.stdout, error["level"]) == (2, "", "error") and says in error["message"]


def test_progress_is_json(here, tmp_path):
    command = [sys.executable, "-m", "rayclip", "data", "verify", str(here / "good.parquet"), "--json-logs"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *_, last = map(json.loads, done.stderr.splitlines())
    assert (last["level"], last["task"], last["completed"], last["total"]) == ("progress", "verify good.parquet", 9, 9)


@pytest.mark.parametrize("app", [rayclip_app, "sweeps/mmcoa_shots.py"])
def test_every_command_with_quiet_has_json_logs(app):
    if isinstance(app, str):
        file = Path(__file__).parents[2] / app
        done = subprocess.run([sys.executable, file, "--help"], capture_output=True, text=True, check=True)
        assert "--quiet" in done.stdout and "--json-logs" in done.stdout
        return
    waiting, with_quiet = [typer.main.get_command(app)], 0
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        options = {word for p in command.params for word in p.opts}
        assert ("--quiet" in options) == ("--json-logs" in options), command.name
        with_quiet += "--quiet" in options
    assert with_quiet >= 12


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        (None, "there is no MLflow store at"),
        ("http://127.0.0.1:9", "does not answer"),
        ("somewhere", "cannot be reached"),
        ("postgresql://me:secret@localhost/mlflow", "holds a secret"),
    ],
)
def test_ui_says_in_a_sentence_what_is_not_there(monkeypatch, capsys, tmp_path, uri, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    where = [] if uri is None else ["--tracking-uri", uri]
    code, out, err = call(monkeypatch, capsys, "ui", "--no-browser", *where)
    assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1 and ":secret@" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "mmcoa"], ("own", 1 / 255, 1 / 255, 1e-3, False)),
        (["--method", "mmcoa", "--recipe", "paper"], ("pgd", 1 / 255, 1 / 255, 1e-6, True)),
        (["--method", "mmcoa", "--recipe", "paper", "--attack", "own"], ("own", 1 / 255, 1 / 255, 1e-6, True)),
        (["--method", "fare", "--recipe", "paper"], ("own", 4 / 255, 1 / 255, 1e-5, True)),
        (["--method", "fare", "--eps", "2/255"], ("own", 2 / 255, 1 / 255, 1e-3, False)),
        (["--method", "advpt", "--recipe", "paper"], ("own", 8 / 255, 1 / 255, 2e-3, True)),
        (["--method", "advpt", "--recipe", "paper", "--eps", "4/255"], ("own", 4 / 255, 0.5 / 255, 2e-3, True)),
        (["--method", "tecoa", "--eps", "32/255", "--steps", "10"], ("own", 32 / 255, 8 / 255, 1e-3, False)),
        (["--method", "tecoa", "--step-size", "3/255"], ("own", 1 / 255, 3 / 255, 1e-3, False)),
    ],
)
def test_train_takes_the_published_settings_with_the_published_recipe(monkeypatch, capsys, tmp_path, options, expected):
    seen = []
    monkeypatch.setattr("rayclip.api.fine_tune", lambda trial, where: seen.append(trial) or True)
    code, out, err = call(
        monkeypatch, capsys, "train", "--model", "digits", "--data", "digits", "--out", tmp_path / "m", *options
    )
    assert code == 0, err
    method, recipe = seen[0].config.method, seen[0].config.recipe
    assert (method.against, method.eps, method.step_length) == (expected[0], *map(pytest.approx, expected[1:3]))
    assert (recipe.lr, recipe.warmup_whole) == expected[3:]
    assert f"--eps {round(method.eps * 255)}/255" in out
    if method.name == "advpt":
        assert method.context == 32 and recipe.epochs == 200


def test_what_an_object_store_says_is_one_sentence(monkeypatch, capsys):
    def lists() -> None:
        raise OSError("When listing objects under key 'a' in bucket 'b': AWS Error NO_SUCH_BUCKET")

    app = typer.Typer()
    app.command()(lists)
    code, out, err = call(monkeypatch, capsys, app=app)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and "NO_SUCH_BUCKET" in err

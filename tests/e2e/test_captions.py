"""Captions from a generator on a real Ray: interrupted, killed, gone on with, and chosen from."""

import json
import os
import signal
import subprocess

import pytest

import tiny_generators
from e2e.test_commands import RAYCLIP, kill_tree, run, wait_for
from rayclip.data import open_data
from rayclip.data.captions import read_captions

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("generators")
    return {
        "text": tiny_generators.text_model(base / "text"),
        "image": tiny_generators.chat_vision_model(base / "image"),
    }


def generate(model, out, *more):
    """A class a part, and long enough answers for the work to be interrupted in between."""
    options = ["--data", "digits", "--per-class", "4", "--batch-size", "4", "--max-new-tokens", "200", "--quiet"]
    return ["captions", "generate", "--generator", model, *options, "--out", out, *more]


@pytest.mark.parametrize(("kind", "stop"), [("text", signal.SIGINT), ("image", signal.SIGKILL)])
def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(models, tmp_path, kind, stop):
    more = ["--images", "2"] if kind == "image" else []
    done = run(tmp_path, *generate(models[kind], "whole.json", *more, "--workers", "9"))
    assert done.stdout.startswith("captions: whole.json (40 sentences of 10 classes)\n") and done.stderr == ""
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert list(whole) == list(open_data("digits", "train").class_names)
    assert all(len(set(own)) == 4 for own in whole.values())

    command = [*RAYCLIP, *generate(models[kind], "broken.json", *more)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parts = tmp_path / "broken.parts"
    wait_for(lambda: any(parts.glob("part-*.json")))
    if stop == signal.SIGINT:
        process.send_signal(stop)
        assert process.communicate(timeout=60)[1].rstrip().endswith("the same command goes on from here.")
        assert process.returncode == 130
    else:
        kill_tree(process)
    before = {part.name: part.stat().st_mtime_ns for part in parts.glob("part-*.json")}
    assert 0 < len(before) < 10 and not (tmp_path / "broken.json").exists()

    run(tmp_path, *generate(models[kind], "broken.json", *more))
    assert json.loads((tmp_path / "broken.json").read_text()) == whole
    after = {part.name: part.stat().st_mtime_ns for part in parts.glob("part-*.json")}
    assert len(after) == 10 and before.items() <= after.items(), "what was there is not written again"

    again = run(tmp_path, *generate(models[kind], "broken.json", *more), RAY_ADDRESS="127.0.0.1:9")
    assert "already holds these captions; nothing to do" in again.stdout
    other = run(tmp_path, *generate(models[kind], "broken.json", *more, "--seed", "1"), check=False)
    assert other.returncode == 2 and "was begun with another seed" in other.stderr

    run(
        tmp_path,
        "captions",
        "filter",
        "broken.json",
        "--data",
        "digits",
        "--model",
        "digits",
        "--keep",
        "3",
        "--out",
        "c.csv",
    )
    chosen = read_captions(tmp_path / "c.csv", open_data("digits", "test").class_names)
    assert all(set(own) <= set(whole[name]) for own, name in zip(chosen, whole, strict=True))
    assert "0 zero" in run(tmp_path, "captions", "show", "c.csv").stdout


def test_a_lost_worker_is_replaced(models, tmp_path):
    """The actor's process is killed in the middle of work; the run ends all the same."""
    run(tmp_path, *generate(models["text"], "whole.json"))
    process = subprocess.Popen([*RAYCLIP, *generate(models["text"], "c.json")], cwd=tmp_path, start_new_session=True)
    wait_for(lambda: any((tmp_path / "c.parts").glob("part-*.json")))
    children = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    table = [line.split(None, 2) for line in children.splitlines()[1:]]
    parent = {int(pid): int(ppid) for pid, ppid, _ in table}

    def ours(pid):
        while pid in parent and pid != process.pid:
            pid = parent[pid]
        return pid == process.pid

    actors = [int(pid) for pid, _, args in table if "ray::_Actor" in args and ours(int(pid))]
    assert len(actors) == 1
    os.kill(actors[0], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "c.json").read_text() == (tmp_path / "whole.json").read_text()

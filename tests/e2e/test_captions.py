"""Captions from a generator on a real Ray: interrupted, killed, gone on with, and chosen from."""

import functools
import json
import os
import signal
import subprocess

import pytest

import tiny_generators
from calling import run_here
from e2e.test_commands import NO_RAY, RAYCLIP, kill_tree
from rayclip.data import open_data
from rayclip.data.captions import read_captions
from servers import wait_for

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
    images = ["--images", "2"] if model.endswith("image") else []
    return ["captions", "generate", "--generator", model, *options, *images, "--out", out, *more]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """What an undisturbed run of a kind writes, on as many workers as there is room for."""
    cwd = tmp_path_factory.mktemp("whole")

    @functools.cache
    def written(kind):
        done = run_here(cwd, *generate(models[kind], f"{kind}.json", "--workers", "9"))
        assert done.stdout.startswith(f"captions: {kind}.json (40 sentences of 10 classes)\n") and done.stderr == ""
        found = json.loads((cwd / f"{kind}.json").read_text())
        assert list(found) == list(open_data("digits", "train").class_names)
        assert all(len(set(own)) == 4 for own in found.values())
        return found

    return written


@pytest.mark.parametrize(("kind", "stop"), [("text", signal.SIGTERM), ("image", signal.SIGKILL)])
@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(models, whole, tmp_path, kind, stop):
    command = [*RAYCLIP, *generate(models[kind], "c.json")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parts = tmp_path / "c.parts"
    wait_for(lambda: any(parts.glob("part-*.json")))
    if stop == signal.SIGTERM:
        process.send_signal(stop)
        assert process.communicate(timeout=180)[1].rstrip().endswith("the same command goes on from here.")
        assert process.returncode == 143
    else:
        kill_tree(process)
    before = {part.name: part.stat().st_mtime_ns for part in parts.glob("part-*.json")}
    assert 0 < len(before) < 10 and not (tmp_path / "c.json").exists()

    run_here(tmp_path, *generate(models[kind], "c.json"))
    assert json.loads((tmp_path / "c.json").read_text()) == whole(kind)
    after = {part.name: part.stat().st_mtime_ns for part in parts.glob("part-*.json")}
    assert len(after) == 10 and before.items() <= after.items(), "what was there is not written again"


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_what_was_written_can_be_chosen_from(models, whole, tmp_path):
    """The actor's process is killed in the middle of work; the run ends all the same."""
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
    assert process.wait(timeout=300) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == whole("text")

    again = run_here(tmp_path, *generate(models["text"], "c.json"), **NO_RAY)
    assert "already holds these captions; nothing to do" in again.stdout
    options = ["--data", "digits", "--model", "digits", "--keep", "3", "--out", "c.csv"]
    run_here(tmp_path, "captions", "filter", "c.json", *options)
    chosen = read_captions(tmp_path / "c.csv", open_data("digits", "test").class_names)
    assert all(set(own) <= set(whole("text")[name]) for own, name in zip(chosen, whole("text"), strict=True))

"""`rayclip report` and `rayclip leaderboard` on result folders, and one sentence for what cannot work."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from calling import call
from rayclip.attacks import ATTACKS, attack_as_described, parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, make_cells, missing_shards
from rayclip.evaluation.cell import described_budget
from rayclip.evaluation.plan import chosen_positions
from rayclip.models import load_model
from rayclip.types import UserError
from reports.made import BERT, CLEAN, bits, fingerprint, pgd, put


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, model in enumerate(("a", "b")):
        for j, attack in enumerate((CLEAN, pgd(), BERT)):
            put(tmp_path / "results", model, attack, bits(3 * i + j), dataset="digits")
    return tmp_path


@pytest.mark.parametrize("args", [(), ("--out", "-")])
def test_markdown_to_standard_output(monkeypatch, capsys, results, args):
    code, out, _ = call(monkeypatch, capsys, "report", "results", *args)
    assert code == 0 and out.startswith("# Robustness report") and "| a |" in out
    assert [path.name for path in results.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("name", "start"),
    [("r.md", "# "), ("r.tex", r"\documentclass"), ("r.csv", "model,"), ("r.html", "<!doctype html>")],
)
def test_the_files_ending_chooses_the_format(monkeypatch, capsys, results, name, start):
    code, out, _ = call(monkeypatch, capsys, "report", "results", "--out", name)
    assert code == 0 and name in out
    assert (results / name).read_text().startswith(start)


def test_the_format_can_be_said(monkeypatch, capsys, results):
    code, out, _ = call(monkeypatch, capsys, "report", "results", "--format", "csv")
    assert code == 0 and {row["model"] for row in csv.DictReader(io.StringIO(out))} == {"a", "b"}


def test_figures_are_written_and_linked(monkeypatch, capsys, results):
    (results / "text").mkdir()
    code, _, _ = call(monkeypatch, capsys, "report", "results", "--out", "text/r.md", "--figures", "pictures")
    assert code == 0
    assert {p.suffix for p in (results / "pictures").iterdir()} == {".svg", ".pdf", ".png"}
    assert "](../pictures/tradeoff.svg)" in (results / "text" / "r.md").read_text()


def test_published_numbers_stand_beside_ours(monkeypatch, capsys, results):
    put(results / "results", "ViT-B-32:openai", pgd(), bits(1), dataset="cifar10")
    code, out, _ = call(monkeypatch, capsys, "report", "results", "--against", "mmcoa:I")
    assert code == 0 and "Beside mmcoa, table I" in out and "9.32" in out


def test_runs_of_mlflow_stand_for_their_results(monkeypatch, capsys, results):
    from rayclip.tracking.experiment import Experiment

    uri = f"sqlite:///{results}/mlflow.db"
    tracker, at = Experiment(uri, "study"), {"rayclip.results": str(results / "results")}
    everything = tracker.start("sweep", tags=at)
    one = tracker.start("eval a", parent=everything, tags=at | {"rayclip.model": fingerprint("a")})
    two = tracker.start("eval b", parent=everything, tags=at | {"rayclip.model": fingerprint("b")})

    def models(*runs):
        code, out, _ = call(monkeypatch, capsys, "report", *runs, "--format", "csv", "--tracking-uri", uri)
        assert code == 0
        return {row["model"] for row in csv.DictReader(io.StringIO(out))}

    assert models(everything) == {"a", "b"} and models(one) == {"a"} and models(f"runs:/{two}") == {"b"}
    assert models(one, two) == {"a", "b"} and models(one, everything) == models(everything, one) == {"a", "b"}
    code, _, err = call(monkeypatch, capsys, "report", "0" * 32, "--tracking-uri", uri)
    assert code == 2 and "there is no run" in err and err.count("\n") == 1


def test_the_leaderboard_is_a_folder_with_a_page(monkeypatch, capsys, results):
    code, out, _ = call(monkeypatch, capsys, "leaderboard", "results", "--out", "board", "--title", "My board")
    assert code == 0 and "index.html" in out
    assert "<h1>My board</h1>" in (results / "board" / "index.html").read_text()
    assert len(list(csv.DictReader((results / "board" / "leaderboard.csv").open()))) == 8


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["report", "nothing"], "holds no results"),
        (["report", "unfinished"], "has no cell.json and is left out): run rayclip eval --out unfinished"),
        (["report", "results", "--out", "no/folder/r.html"], "there is no folder"),
        (["report", "results", "--out", "results"], "is a folder"),
        (["report", "results", "--format", "pdf"], "pdf"),
        (["report", "results", "--out", "r.pdf"], "ends in .md"),
        (["report", "results", "--baseline", "nobody", "--out", "r.html"], "there is no model 'nobody'"),
        (["report", "results", "--against", "nobody:I", "--out", "r.html"], "no paper"),
        (["report", "results", "--against", "mmcoa:IX", "--out", "r.html"], "only I, II"),
        (["report", "results", "--figures", "file", "--out", "r.html"], "is a file"),
        (["report"], "DIR"),
        (["leaderboard", "results", "--out", "file"], "is a file"),
        (["leaderboard", "nothing", "--out", "board"], "holds no results"),
        (["leaderboard", "results", "--out", "board", "--add", "local-dir:nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(monkeypatch, capsys, results, args, sentence):
    (results / "file").write_text("")
    (results / "unfinished" / "cells" / "abc").mkdir(parents=True)
    before = set(results.rglob("*"))
    code, _, err = call(monkeypatch, capsys, *args)
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert set(results.rglob("*")) == before


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_made_again_from_its_protocol(name, tmp_path):
    kind = ATTACKS[name]
    np.save(tmp_path / "uap.npy", np.zeros((3, 8, 8), np.float32))
    of_files = {"semantic": {"captions": "digits", "texts": (("a", "b"),)}, "transfer": {"source": "digits"}}
    of_files["uap"] = {"file": str(tmp_path / "uap.npy")}
    attack = kind(**of_files.get(name, {})).pinned().within(1 / 255)
    described = {"attack": name, **described_budget(attack), **attack.describe()}
    if name in of_files:
        with pytest.raises(UserError, match="rayclip eval"):
            attack_as_described(described)
        return
    again = attack_as_described(described)
    assert again == attack


def test_a_setting_that_is_not_the_default_comes_back():
    for text in (
        "pgd:steps=7,step=0.5/255,stop=final,norm=l2",
        "sga:scales=0.5+1",
        "bert:k=3,changes=2",
        "apgd-t:targets=4",
    ):
        (parsed,) = parse_attacks(text, {})
        attack = parsed.within(1 / 255)
        described = {"attack": attack.name, **described_budget(attack), **attack.describe()}
        assert attack_as_described(described) == attack


def test_a_model_whose_verdicts_are_there_is_added_without_computing_them(monkeypatch, capsys, tmp_path):
    """The evaluation of the board's first folder has the model already, under a name of its own."""
    monkeypatch.chdir(tmp_path)
    data = open_data("digits", "test")
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", data)],
        parse_attacks("clean,bert", {"substitutes": "clip-table"}),
        Protocol(),
    )
    store = Store("results")
    for cell in cells:
        store.write_json(f"cells/{cell.id}/cell.json", cell.record())
        for shard in missing_shards(cell, chosen_positions(len(data), 10), store, 10):
            Evaluator(store).run(shard)
    with monkeypatch.context() as patch:
        patch.setattr("rayclip.distributed.evaluating.evaluate", lambda *args, **settings: pytest.fail("it is there"))
        code, _, err = call(monkeypatch, capsys, "leaderboard", "results", "--out", "board", "--add", "digits")
    assert code == 0, err
    lines = list(csv.DictReader(Path("board/leaderboard.csv").read_text().splitlines()))
    assert {(line["model"], line["n"]) for line in lines} == {("digits", "10")}

"""Retrieval in a report, from results that `rayclip retrieval` has written."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from calling import call
from conftest import tiny_clip
from data.test_pairs import CAPTIONS, write_pairs
from rayclip.models.checkpoint import save_checkpoint
from rayclip.reports.grid import Cell, Grid
from rayclip.reports.to_terminal import grid_group
from rayclip.store import Store
from reports.made import CLEAN, bits, describe, fingerprint, put

KS = (1, 5, 10)
ATTACKS = ["--attacks", "clean,pgd:steps=2,bert", "--eps", "2/255", "--substitutes", "clip-table"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder of the results of two models, and the rows that the command gave."""
    folder = tmp_path_factory.mktemp("searched")
    write_pairs(folder / "pairs.parquet", CAPTIONS)
    for seed in (0, 1):
        save_checkpoint(tiny_clip(seed), folder / f"model{seed}", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        models = [word for seed in (0, 1) for word in ("--model", f"local-dir:{folder}/model{seed}")]
        options = ["--out", "out", "--no-tracking", "--quiet", "--json", "rows.json"]
        command = ["retrieval", "--data", str(folder / "pairs.parquet"), *models, *ATTACKS, *options]
        patch.setattr("sys.argv", ["rayclip", *command])
        from rayclip import cli

        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
    return folder


@pytest.fixture
def report(searched, monkeypatch, capsys):
    monkeypatch.chdir(searched)

    def make(*args):
        code, out, err = call(monkeypatch, capsys, "report", "out", *args)
        assert (code, err) == (0, "")
        return out

    return make


def test_a_folder_with_retrieval_alone_makes_tables_with_intervals_and_protocol(report, searched):
    text = report()
    assert "Retrieval: 2 models on 1 set of image-caption pairs." in text and "verdicts" not in text
    assert text.count("| model | TR@1 | TR@5 | TR@10 | IR@1 | IR@5 | IR@10 |") == 3
    for name in ("clean", "pgd-2 2/255", "bert"):
        assert f"**pairs, {name}: recall in %**" in text
    rows = json.loads((searched / "rows.json").read_text())
    for attack in ("clean", "pgd-2_eps2", "bert"):
        for direction, k in ((d, k) for d in ("tr", "ir") for k in KS):
            both = [r for r in rows if (r["attack"], r["direction"], r["k"]) == (attack, direction, k)]
            assert len(both) == 2
            best = max(both, key=lambda r: r["recall"])
            number = "100" if best["recall"] == 100 else f"{best['recall']:.1f}"
            assert f"**{number}** {best['ci_low']:.0f}–{best['ci_high']:.0f}" in text
    assert "n = 5 images (TR) and 8 captions (IR), 95 % Wilson intervals, best in bold." in text
    assert "ties count against the query" in text
    assert "pgd-2 2/255: steps 2, step 1.25/255, norm linf" in text and "adversarial under bert" in text


def test_the_csv_has_a_line_a_number(report, searched):
    lines = list(csv.DictReader(io.StringIO(report("--format", "csv"))))
    rows = json.loads((searched / "rows.json").read_text())
    theirs = {(r["model"], r["attack"], f"{r['direction']}_r@{r['k']}", r["n"], f"{r['recall']:.4f}") for r in rows}
    ours = {(x["spec"], x["attack"], x["metric"], int(x["n"]), x["recall"]) for x in lines}
    assert len(lines) == 36 and ours == theirs
    assert {json.loads(x["protocol"])["images"] for x in lines} == {5}


def test_page_and_latex_have_them_too(report):
    assert ">TR@10</button>" in report("--format", "html")
    tex = report("--format", "tex")
    assert "TR@10" in tex and r"\textbf{" in tex


def test_they_stand_beside_accuracies(searched, tmp_path, monkeypatch, capsys):
    put(tmp_path / "mixed", "m", CLEAN, bits(1), dataset="digits")
    (tmp_path / "mixed" / "retrieval").symlink_to(searched / "out" / "retrieval")
    monkeypatch.chdir(tmp_path)
    code, text, _ = call(monkeypatch, capsys, "report", "mixed", "--format", "csv")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert code == 0 and {bool(x["top1"]) != bool(x["recall"]) for x in lines} == {True} and len(lines) == 37
    code, _, _ = call(monkeypatch, capsys, "leaderboard", "mixed", "--out", "board")
    assert code == 0 and "recall" not in (tmp_path / "board" / "leaderboard.csv").read_text()
    code, _, err = call(monkeypatch, capsys, "leaderboard", str(searched / "out"), "--out", "none")
    assert code == 2 and "use rayclip report" in err and not Path("none").exists()


def test_a_damaged_result_is_named(tmp_path, monkeypatch, capsys):
    Store(str(tmp_path)).write_json("retrieval/x.json", {"protocol": {}, "recalls": []})
    code, _, err = call(monkeypatch, capsys, "report", str(tmp_path))
    assert code == 2 and "x.json is damaged" in err and "delete it" in err


# ------------------------------------------------------------------------------------------- beside MMCoA's table VI

VIT = "ViT-B-32:openai"
THEIRS = {
    "attack": "co-attack",
    "eps": "2/255",
    "steps": 10,
    "step": "0.25/255",
    "stop": "final",
    "substitutes": "bert-base-uncased",
    "k": 10,
    "changes": 1,
    "offset": "reference",
}


def put_recalls(root, model, tr, *, images=5000, dataset="mscoco_captions", **changes):
    """A result as the command writes it, with the recalls of a model that is right `tr` times at 1."""
    captions = 5 * images
    fixed = {"text": "adversarial captions", "resolution": "model", "ties": "against the query", "precision": "fp32"}
    protocol = {**THEIRS, **fixed, "images": images, "captions": captions, "defense": "none", "protocol": 2, **changes}
    recalls = [
        {"direction": d, "k": k, "right": min(k * right, n), "n": n}
        for d, right, n in (("tr", tr, images), ("ir", 5 * tr, captions))
        for k in KS
    ]
    name = fingerprint(f"{model} {sorted(protocol.items())}")
    record = {
        "model": model,
        "model_fingerprint": fingerprint(model),
        "dataset": dataset,
        "data_fingerprint": fingerprint(dataset),
        "attack_label": f"co-attack-{protocol['steps']}_eps2",
        "protocol": protocol,
    }
    Store(str(root)).write_json(f"retrieval/{name}.json", {**record, "recalls": recalls})


def beside(tmp_path, monkeypatch, capsys):
    code, text, _ = call(monkeypatch, capsys, "report", str(tmp_path), "--against", "mmcoa:VI")
    assert code == 0
    return text.partition("## Beside mmcoa, table VI")[2]


def test_table_six_stands_beside_ours_where_the_protocol_matches(tmp_path, monkeypatch, capsys):
    put_recalls(tmp_path, VIT, 200)
    put_recalls(tmp_path, "local-dir:/x", 500)
    describe(tmp_path, "local-dir:/x", method="mmcoa", data="imagenet", base=VIT)
    text = beside(tmp_path, monkeypatch, capsys)
    assert "recall in %" in text and "The protocol matches in 12 of 12 numbers" in text
    assert "| ViT-B-32:openai | mscoco | co-attack-10 2/255, TR@1 | 4.0 3–5 | 3.94 | +0.1 |  |" in text
    assert "co-attack-10 2/255, IR@5 | 50.0 49–51 | 18.98 | +31.0 |" in text


def test_what_differs_is_said(tmp_path, monkeypatch, capsys):
    put_recalls(tmp_path, VIT, 20, images=500, steps=5, substitutes="clip-table")
    text = beside(tmp_path, monkeypatch, capsys)
    assert "The protocol matches in 0 of 6 numbers" in text and "| 4.0 3–6 | 3.94 |  | 1 2 3 |" in text
    assert "steps 5, theirs 10" in text and "substitutes clip-table, theirs bert-base-uncased" in text
    assert "500 of the 5,000 images of mscoco" in text and "class names" not in text


def test_of_several_protocols_the_likest_is_taken(tmp_path, monkeypatch, capsys):
    put_recalls(tmp_path, VIT, 100, steps=5)
    put_recalls(tmp_path, VIT, 200)
    assert "matches in 6 of 6" in beside(tmp_path, monkeypatch, capsys)


def test_other_pairs_have_nothing_to_compare(tmp_path, monkeypatch, capsys):
    put_recalls(tmp_path, VIT, 100, dataset="flickr30k")
    assert "the table is about mscoco, these results about flickr30k" in beside(tmp_path, monkeypatch, capsys)


def test_no_name_is_broken_where_the_columns_fill_a_terminal():
    rows = [(name, [Cell(text="100", note="93–100", value=100)] * 6) for name in ("clean", "co-attack-10 64/255")]
    header = ("attack", *(f"{d}@{k}" for d in ("TR", "IR") for k in KS))
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(grid_group(Grid(title="recall", header=header, rows=rows)))
    printed = console.file.getvalue()
    assert "co-attack-10 " in printed and printed.count("100 93–100") == 12
    assert all(len(line) <= 80 for line in printed.splitlines())

"""Prompts and captions that are cut at the context length are counted with the number that stands on them, and said."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from attacks.test_bert import masked_lm
from calling import call
from data.test_data import write
from data.test_pairs import write_pairs
from rayclip import api
from rayclip.api.checks import Opened, check_training, plan_cells
from rayclip.api.request import Evaluation, Where
from rayclip.attacks import make_attack, parse_attacks
from rayclip.attacks.bert import TextSettings
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, missing_shards
from rayclip.evaluation.alarms import cut_alarms
from rayclip.methods import SMALL_MODEL, make_method
from rayclip.models.scorers import CuPL, Ensemble, Template
from rayclip.reports.build import build
from rayclip.reports.notes import cut_notes
from rayclip.reports.results import read_results
from rayclip.reports.rows import result_grids
from rayclip.training import TrainConfig
from rayclip.types import Cut

__all__ = ["masked_lm"]  # a fixture

LONG = "a very long name " * 5  # with a template beyond the tiny model's 16 tokens
NAMES = ["cat", LONG + "one", LONG + "two"]
FOOT = "2 texts are cut at the context length of the text encoder"


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "long.parquet", [0, 1, 2] * 4, names=NAMES)


def planned(saved_clip, data, attacks="clean", scorers=(Template(),), **settings):
    chosen = parse_attacks(attacks, {"substitutes": "clip-table", "steps": 2, **settings})
    evaluation = Evaluation(data=[data], attacks=chosen, protocol=Protocol(eps=1 / 255), scorers=scorers)
    return plan_cells([saved_clip], evaluation, Opened(quiet=True))


def test_class_prompts_are_counted_in_record_row_table_and_report(saved_clip, data, tmp_path):
    cells, positions = planned(saved_clip, data, "clean,pgd,bert")
    assert [cell.cut for cell in cells] == [Cut(texts=2)] * 3
    assert cells[0].id == replace(cells[0], cut=None).id, "how many were cut follows from what is in the id already"
    store = Store(str(tmp_path / "out"))
    for cell in cells:
        store.write_json(f"cells/{cell.id}/cell.json", cell.record())
        for shard in missing_shards(cell, positions[data], store, 20):
            Evaluator(store).run(shard)
    assert store.read_json(f"cells/{cells[0].id}/cell.json")["cut_texts"] == 2
    rows = collect_rows(cells, positions, store)
    assert [r.cut_texts for r in rows if r.attack != "worst"] == [2, 2, 2]
    assert rows == collect_rows([replace(c, cut=None) for c in cells], positions, store), "from the records"
    (table,) = result_grids(rows)
    assert table.caption.count(FOOT) == 1
    (sentence,) = cut_alarms(rows)
    assert sentence.startswith(f"{saved_clip} on long: 2 texts are longer than what the model reads and cut")
    document = build(read_results([store.root]))
    assert FOOT in document.parts[0].grids[0].notes


def test_nothing_is_said_where_nothing_is_cut(saved_clip, tmp_path):
    cells, positions = planned(saved_clip, write(tmp_path / "short.parquet", [0, 1, 2]))
    store = Store(str(tmp_path / "out"))
    for shard in missing_shards(cells[0], [0, 1, 2], store, 20):
        Evaluator(store).run(shard)
    rows = collect_rows(cells, positions, store)
    assert cells[0].cut == Cut() and rows[0].cut_texts == 0
    assert "cut" not in result_grids(rows)[0].caption and cut_alarms(rows) == []


def test_every_text_that_a_number_stands_on_is_counted(saved_clip, data):
    captions = CuPL().with_texts([["a cat", "many words " * 9], ["one"], ["two", "more words " * 9]])
    assert planned(saved_clip, data, scorers=[captions])[0][0].cut == Cut(texts=2)
    assert planned(saved_clip, data, scorers=[Ensemble(templates="simple")])[0][0].cut == Cut(texts=14)
    semantic = make_attack("semantic", sets=1).with_texts([["a cat"], ["words " * 20], ["dog"]], NAMES)
    evaluation = Evaluation(data=[data], attacks=[semantic], protocol=Protocol(eps=1 / 255))
    assert plan_cells([saved_clip], evaluation, Opened(quiet=True))[0][0].cut == Cut(texts=3)


def test_what_the_masked_language_model_does_not_read_is_counted_apart(saved_clip, data, masked_lm):
    settings = {"substitutes": masked_lm}
    short, long = (planned(saved_clip, data, f"bert:max_length={most}", **settings)[0][0].cut for most in (12, 60))
    assert (short, long) == (Cut(texts=2, substitutes=2), Cut(texts=2))
    assert cut_notes([("m", short)])[1] == "2 texts are not read to the end by the masked language model"


def test_models_that_read_more_are_told_apart():
    notes = cut_notes([("small", Cut(3)), ("large", Cut(0)), ("small", Cut(2)), ("middle", Cut(1))])
    assert notes == ["texts cut at the context length of the text encoder: small 3, middle 1"]


def test_retrieval_counts_captions_and_says_it_once(saved_clip, tmp_path, monkeypatch, capsys):
    captions = [[f"caption {i}", f"long words {i} " * 9] for i in range(4)]
    data = write_pairs(tmp_path / "pairs.parquet", captions)
    args = ["retrieval", "--model", saved_clip, "--data", data, "--out", tmp_path / "out", "--no-tracking"]
    args += ["--attacks", "clean,bert", "--substitutes", "clip-table", "--json", tmp_path / "rows.json"]
    for _ in range(2):  # computed, then from disk
        code, out, err = call(monkeypatch, capsys, *args)
        assert code == 0, err
        assert " ".join(out.split()).count("4 texts are cut at the context length of the text encoder") == 1
        assert " ".join(err.split()).count("4 texts are longer than what the model reads") == 1
        assert {r["cut_texts"] for r in json.loads((tmp_path / "rows.json").read_text())} == {4}
    (grid, _) = build(read_results([str(tmp_path / "out")])).parts[0].grids
    assert "4 texts are cut at the context length of the text encoder" in grid.notes


def test_training_says_it_once_for_all_trials(saved_clip, data, capsys, masked_lm):
    opened = Opened(quiet=True)

    def checked(name, **settings):
        recipe = replace(SMALL_MODEL, epochs=1)
        method = make_method(name, **settings)
        check_training(TrainConfig(model=saved_clip, data=data, method=method, recipe=recipe), 1, opened)
        return " ".join(capsys.readouterr().err.split())

    said = "long: 2 of 3 texts that tecoa trains on are longer than the 16 tokens that the model reads"
    assert said in checked("tecoa") and checked("tecoa") == ""
    assert "10 of 15 texts that saft trains on" in checked("saft", captions="templates", sets=5)
    said = checked("mmcoa", text=TextSettings(substitutes=masked_lm, max_length=12))
    assert "BERT-Attack does not read 2 of 3 texts to their end" in said


def test_the_filter_of_captions_says_it(saved_clip, data, tmp_path, monkeypatch, capsys):
    described = {name: [f"{name} of some kind", "words of many kinds " * 9] for name in NAMES}
    (tmp_path / "described.json").write_text(json.dumps(described))
    args = ["captions", "filter", tmp_path / "described.json", "--data", data, "--model", saved_clip, "--keep", 1]
    code, _, err = call(monkeypatch, capsys, *args, "--out", tmp_path / "captions.parquet")
    assert code == 0, err
    assert "captions are longer than the 16 tokens" in " ".join(err.split())
    assert len(pq.read_table(tmp_path / "captions.parquet")) == 3


def test_an_evaluation_warns_of_it(saved_clip, data, tmp_path, monkeypatch, capsys):
    """In the terminal; the evaluation itself is done here without Ray."""
    cells, positions = planned(saved_clip, data)
    store = Store(str(tmp_path / "out"))
    for shard in missing_shards(cells[0], positions[data], store, 20):
        Evaluator(store).run(shard)
    monkeypatch.setattr(
        "rayclip.distributed.connect.ray_cluster", lambda **_: pytest.fail("nothing is left to compute")
    )
    evaluation = Evaluation(data=[data], attacks=parse_attacks("clean", {}), protocol=Protocol(eps=1 / 255))
    rows = api.evaluate_models([saved_clip], evaluation, Where(out=store.root, quiet=True))
    assert rows[0].cut_texts == 2
    assert " ".join(capsys.readouterr().err.split()).count("2 texts are longer than what the model reads") == 1

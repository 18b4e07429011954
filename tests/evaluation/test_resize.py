"""How native images reach the model's input, from the protocol to the verdicts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import tiny_clip
from data.test_data import write
from data.test_pairs import write_pairs
from rayclip import api
from rayclip.api.checks import evaluations_of
from rayclip.api.request import Where
from rayclip.attacks import parse_attacks
from rayclip.data import batch_pixels, open_data, open_pairs
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, make_cells, missing_shards, retrieval
from rayclip.evaluation.examples import pngs
from rayclip.evaluation.retrieval import make_task, read_recalls, run_task
from rayclip.models import ZeroShot
from rayclip.reports.numbers import sections
from rayclip.reports.recalls import recall_grids
from rayclip.reports.results import read_results
from rayclip.reports.rows import result_grids
from rayclip.types import UserError

COUNT = 12


def noisy(count, side=13):
    """Pictures in which neighbouring pixels differ: what anti-aliasing blurs."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return pngs(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "noisy.parquet", [0, 1, 2] * (COUNT // 3), noisy(COUNT))
    return str(tmp_path / "noisy.parquet")


def cells_of(saved_clip, data, resize, attacks="clean,pgd:steps=3,step=4/255", **protocol):
    model = (saved_clip, tiny_clip().fingerprint())
    chosen = Protocol(eps=8 / 255, resize=resize, **protocol)
    return make_cells([model], [(data, open_data(data, "test"))], parse_attacks(attacks, {}), chosen)


def run(cell, store, evaluator):
    for shard in missing_shards(cell, range(COUNT), store, 5):
        evaluator.run(shard)
    table = store.read_tables(store.names(f"cells/{cell.id}", ".parquet")).sort_by("position")
    return {name: table[name].to_numpy() for name in ("clean_pred", "clean_margin", "adv_margin", "linf")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_worker_that_keeps_a_model_resizes_each_cell_in_its_own_way(saved_clip, data, tmp_path, precision):
    """Cells that share a loaded model take turns; each has the verdicts that a worker of its own gives it."""
    plain, default = (cells_of(saved_clip, data, how, precision=precision) for how in ("plain", "antialias"))
    assert {c.id for c in plain}.isdisjoint(c.id for c in default)
    shared = Evaluator(Store(str(tmp_path / "shared")), batch_size=4)
    found = {}
    for cell in [plain[0], default[0], plain[1], default[1]]:
        found[cell.id] = run(cell, shared.store, shared)
        alone = Store(str(tmp_path / "alone" / cell.id))
        for name, values in run(cell, alone, Evaluator(alone, batch_size=4)).items():
            assert np.array_equal(values, found[cell.id][name]), name
    assert not np.allclose(found[plain[0].id]["clean_margin"], found[default[0].id]["clean_margin"], atol=1e-4)
    opened, clip = open_data(data, "test"), tiny_clip()
    pixels = batch_pixels(opened, range(COUNT), "native", 8).float() / 255
    with torch.no_grad():
        right = ZeroShot(clip.with_resize("plain"), opened.class_names)(pixels).argmax(1)
    assert found[plain[0].id]["clean_pred"].tolist() == right.tolist()


def test_it_is_in_the_protocol_of_rows_and_records_and_at_the_foot(saved_clip, data, tmp_path):
    store = Store(str(tmp_path / "out"))
    positions = {data: np.arange(COUNT)}
    rows = []
    for how in ("plain", "antialias"):
        cells = cells_of(saved_clip, data, how, attacks="clean")
        store.write_json(f"cells/{cells[0].id}/cell.json", cells[0].record())
        run(cells[0], store, Evaluator(store))
        rows = collect_rows(cells, positions, store)
        assert rows[0].protocol["resize"] == how
        assert f"native resolution ({how} resize)" in result_grids(rows)[0].caption
    found = read_results([store.root])
    assert {s.shared["resize"] for s in sections(found)} == {"plain", "antialias"}, "no table mixes the two"
    assert {e.protocol.resize for e in evaluations_of(found)} == {"plain", "antialias"}
    cell = store.read_json(f"cells/{cells[0].id}/cell.json")
    del cell["protocol"]["resize"]
    store.write_json(f"cells/{cells[0].id}/cell.json", cell)
    assert {s.shared["resize"] for s in sections(read_results([store.root]))} == {"plain", "antialias"}, (
        "results that do not say are of a time when all were anti-aliased"
    )


def test_it_has_nothing_to_do_at_the_models_resolution():
    with pytest.raises(UserError, match="--resize"):
        Protocol(resolution="model", resize="plain")
    with pytest.raises(UserError, match="antialias"):
        Protocol(resize="bicubic")


def test_retrieval(saved_clip, tmp_path):
    write_pairs(tmp_path / "pairs.parquet", [[f"caption {i}"] for i in range(COUNT)], noisy(COUNT))
    pairs, store = open_pairs(str(tmp_path / "pairs.parquet")), Store(str(tmp_path / "out"))
    clip, seen = tiny_clip(), {}
    for how in ("plain", "antialias"):
        task = make_task((saved_clip, clip.fingerprint()), pairs, resolution="native", resize=how)
        embedded = retrieval.embed_pairs(clip.with_resize(how), pairs, resolution="native")
        run_task(task, clip, pairs, store)
        rows = read_recalls(task, store)
        wanted = [r.right for r in retrieval.recall_of(embedded)]
        assert [round(r.recall * r.n / 100) for r in rows] == wanted
        assert f"native resolution ({how} resize)" in recall_grids(rows)[0].caption
        seen[how] = task.id, json.dumps(wanted)
    assert seen["plain"][0] != seen["antialias"][0]
    assert clip.resize == "antialias"
    with pytest.raises(UserError, match="--resolution"):
        api.evaluate_retrieval([saved_clip], "nowhere", Where(out=str(tmp_path)), resize="plain")


def test_two_ways_are_two_cells(saved_clip, data):
    (cell,) = cells_of(saved_clip, data, "antialias", attacks="clean")
    other = replace(cell, protocol=replace(cell.protocol, resize="plain"))
    assert cell.id != other.id and cell.texts_id == other.texts_id

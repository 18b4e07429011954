"""What an evaluation keeps for people to look at, by the evaluator that the actors run; and the figures made of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rayclip.attacks import parse_attacks
from rayclip.data import batch_pixels, open_data
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, make_cells, missing_shards
from rayclip.evaluation.examples import EMBEDDED, EXAMPLES, PROMPTS
from rayclip.models import load_model
from rayclip.reports.build import prompt_part
from rayclip.reports.figures import section_figures
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The bundled model on 40 images: (cells by attack, store)."""
    root = tmp_path_factory.mktemp("results")
    attacks = parse_attacks("clean,fgsm,bert,sep,sga", {"steps": 2, "step": 16 / 255, "substitutes": "clip-table"})
    model = [("digits", load_model("digits").fingerprint())]
    cells = make_cells(model, [("digits", open_data("digits", "test"))], attacks, Protocol(eps=32 / 255))
    store, evaluator = Store(str(root)), Evaluator(Store(str(root)), batch_size=20)
    for cell in cells:
        store.write_json(f"cells/{cell.id}/cell.json", cell.record())
        for shard in missing_shards(cell, chosen_positions(445, 40), store, 40):
            evaluator.run(shard)
    return {cell.attack.name: cell for cell in cells}, store


def kept(run, attack):
    cells, store = run
    return {name.rpartition("/")[2] for name in store.names(f"cells/{cells[attack].id}/examples", "")}


def table(run, attack, kind):
    cells, store = run
    return store.read_tables([f"cells/{cells[attack].id}/examples/{kind}.parquet"])


def test_each_attack_keeps_what_it_changed(run):
    images = {"images.parquet", "features.parquet", "attention.parquet"}
    assert kept(run, "clean") == set()
    assert kept(run, "fgsm") == images
    assert kept(run, "bert") == {"texts.json"}
    assert kept(run, "sep") == kept(run, "sga") == images | {"texts.json"}


def test_examples_are_no_verdicts(run):
    cells, store = run
    assert len(missing_shards(cells["sep"], chosen_positions(445, 40), store, 40)) == 0
    assert len(store.read_tables(store.names(f"cells/{cells['sep'].id}", ".parquet"), ["position"])) == 40


def test_features_are_the_models_embeddings_of_the_first_images(run):
    found, clip = table(run, "fgsm", "features"), load_model("digits")
    data, positions = open_data("digits", "test"), chosen_positions(445, 40)[:20].tolist()
    assert len(found) == min(20, EMBEDDED)
    with torch.no_grad():
        expected = clip.encode_image(batch_pixels(data, positions, "native", clip.image_size).float() / 255)
    assert np.allclose(np.stack(found["clean"].to_numpy(zero_copy_only=False)), expected, atol=2e-3)
    moved = np.stack(found["adversarial"].to_numpy(zero_copy_only=False))
    assert np.allclose(np.linalg.norm(moved, axis=1), 1, atol=2e-3) and not np.allclose(moved, expected, atol=0.05)


def test_attention_maps_are_grey_and_scaled_per_image(run):
    found = table(run, "fgsm", "attention")
    assert len(found) == EXAMPLES
    for row in found.to_pylist():
        maps = [np.asarray(Image.open(io.BytesIO(row[kind]))) for kind in ("clean", "adversarial")]
        side = load_model("digits").image_size
        assert all(m.shape == (side, side) and m.dtype == np.uint8 for m in maps)
        assert all(int(m.max()) - int(m.min()) > 60 for m in maps)


def test_kept_prompts_are_the_changed_ones(run):
    cells, store = run
    texts = store.read_json(f"texts/{cells['bert'].texts_id}.json")
    changed = [entry for entry in texts if entry["clean"] != entry["adversarial"]]
    assert store.read_json(f"cells/{cells['bert'].id}/examples/texts.json") == changed[:PROMPTS]
    own = store.read_json(f"cells/{cells['sga'].id}/examples/texts.json")  # of the images, not of the classes
    assert own and all(entry["clean"] != entry["adversarial"] for entry in own)


def test_all_figures_of_examples_are_drawn(run):
    _, store = run
    results = read_results([store.root])
    (section,) = sections(results)
    figures = {figure.name: figure for figure in section_figures(results, section)}
    assert {"bars", "tsne", "images-1", "attention-1"} == set(figures)
    for figure in figures.values():
        figure.draw(3).savefig(io.BytesIO(), format="svg")
    assert "mean cosine" in figures["tsne"].caption
    (prompts,) = prompt_part(section).grids
    assert all(cells[0].text != cells[1].text and "→" in cells[2].text for _, cells in prompts.rows)

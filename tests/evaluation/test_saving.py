"""Adversarial images as a prepared data set: exact, whichever workers wrote it, and read by other models and tools."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

import rayclip
from conftest import tiny_clip
from rayclip import api
from rayclip.attacks import parse_attacks
from rayclip.data import batch_pixels, open_data
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, collect_rows, make_cells, outstanding
from rayclip.evaluation.saving import save_adversarial, set_name, write_set
from rayclip.models import ZeroShot, load_model
from rayclip.types import UserError

POSITIONS = {"digits": chosen_positions(445, 24)}


def make(attacks, data="digits", **protocol):
    opened = open_data(data, "test")
    parsed = parse_attacks(attacks, {"steps": 3, "step": 12 / 255, "substitutes": "clip-table"})
    protocol = Protocol(**{"eps": 30.5 / 255} | protocol)
    return make_cells([("digits", load_model("digits").fingerprint())], [(data, opened)], parsed, protocol)


def run(cells, positions, store, shard_size, batch_size=128, save=True):
    evaluator = Evaluator(store, batch_size=batch_size)
    work = outstanding(cells, positions, store, shard_size, save_images=save)
    for shards in work:
        for shard in shards:
            evaluator.run(shard)
    return [(shards.writes, len(shards.positions)) for shards in work]


def verdicts(store, cell):
    return store.read_tables(store.names(f"cells/{cell.id}", ".parquet")).sort_by("position").to_pylist()


@pytest.mark.parametrize("resolution", ["native", pytest.param("model", marks=pytest.mark.ci)])
def test_the_set_is_what_was_judged_and_does_not_depend_on_the_workers(resolution, tmp_path):
    cells = make("clean,pgd", resolution=resolution)
    cell, (once, plain, twice) = cells[1], (Store(str(tmp_path / name)) for name in ("once", "plain", "twice"))
    assert run(cells, POSITIONS, once, 64) == [("verdicts", 24), ("both", 24)]
    run(cells, POSITIONS, plain, 64, save=False)
    assert verdicts(once, cell) == verdicts(plain, cell), "saving changes no verdict"
    first = write_set(cell, once)

    few = {"digits": chosen_positions(445, 8)}
    run(cells, few, twice, 7, batch_size=3, save=False)  # evaluated before anybody asked for images
    assert run(cells, few, twice, 5, batch_size=3) == [("images", 8)]
    assert write_set(cell, twice).samples == 8
    assert run(cells, POSITIONS, twice, 9, batch_size=4) == [("verdicts", 16), ("both", 16)]
    second = write_set(cell, twice)
    assert [r["position"] for r in verdicts(twice, cell)] == POSITIONS["digits"].tolist(), "no verdict is there twice"
    assert run(cells, POSITIONS, twice, 64) == [] and write_set(cell, twice) == second

    sets = [open_data(found.place, "test") for found in (first, second)]
    assert sets[0].fingerprint == sets[1].fingerprint and first[1:] == second[1:]
    assert sets[0].ids.tolist() == open_data("digits", "test").ids[POSITIONS["digits"]].tolist()
    assert sets[0].class_names == cell.class_names

    read = datasets.load_dataset("parquet", data_files=f"{first.place}/test-*.parquet", split="train")
    assert read.features["label"].names == list(cell.class_names)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in read["image"]])
    assert torch.equal(pixels, batch_pixels(sets[0], range(24), "native", 0))
    side = {"native": 8, "model": load_model("digits").image_size}[resolution]
    assert pixels.shape[1:] == (3, side, side)
    labels = torch.tensor(read["label"])
    clean = batch_pixels(open_data("digits", "test"), POSITIONS["digits"].tolist(), resolution, side)
    assert 0 < (pixels.int() - clean.int()).abs().max() <= 31
    clf = ZeroShot(load_model("digits"), cell.class_names)
    with torch.no_grad():
        right_before, right = (clf(x.float() / 255).argmax(1) == labels for x in (clean, pixels))
    unrounded = torch.tensor([r["adv_pred"] == r["label"] for r in verdicts(once, cell)])
    assert first.successes == (right_before & ~unrounded).sum() > 0
    assert first.surviving == (right_before & ~unrounded & ~right).sum() <= first.successes
    assert first.accuracy == pytest.approx(100 * (right_before & right).float().mean().item())

    # Evaluated as data, by the model that it was made against: clean accuracy is that after rounding
    (again, _) = make("clean,pgd", first.place, resolution=resolution)
    everything = {first.place: np.arange(24)}
    run([again], everything, once, 64, save=False)
    assert collect_rows([again], everything, once)[0].top1 == pytest.approx(100 * right.float().mean().item())


def test_a_budget_of_no_whole_255ths_is_noted_and_a_whole_set_needs_no_second_copy(tmp_path):
    store = Store(str(tmp_path))
    (cell,) = make("fgsm", eps=2.5 / 255)
    cell, whole = replace(cell, data="digits"), {"digits": np.arange(445)}
    run([cell], whole, store, 200)
    found = write_set(cell, store)
    assert found.samples == 445 and not (tmp_path / "cells" / cell.id / "adversarial").exists()
    assert run([cell], whole, store, 64) == [] and write_set(cell, store) == found
    (note,) = (n for n in open_data(found.place, "test").notes if "budget" in n)
    assert "3/255" in note and "2.5/255" in note
    (tmp_path / "adversarial" / set_name(cell) / "ids-test.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="ids-test"):
        open_data(found.place, "test")


def test_an_evaluation_says_what_survives_and_keeps_the_texts(tmp_path, capsys):
    cells = make("clean,pgd,bert,sep", eps=16 / 255)
    store = Store(str(tmp_path))
    run(cells, POSITIONS, store, 64)
    asked = api.Evaluation(
        data=["digits"],
        attacks=[cell.attack for cell in cells],
        protocol=Protocol(eps=16 / 255),
        limit=24,
    )
    where = api.Where(out=str(tmp_path), save_adversarial=True, quiet=True)
    for _ in range(2):  # everything is there: nothing is computed, and no Ray is needed
        api.evaluate_models(["digits"], asked, where)
        said = [line for line in capsys.readouterr().err.splitlines() if "survive" in line]
        assert len(said) == 2 and all("successes survive rounding" in line for line in said)
    logged = [
        value
        for file in tmp_path.glob("journal/*.jsonl")
        for line in file.read_text().splitlines()
        for value in json.loads(line).get("values", [])
        if value[0].startswith("rounded/")
    ]
    assert [name for name, *_ in logged] == ["rounded/pgd-3_eps16/digits", "rounded/sep_pgd-3_eps16/digits"]
    sep = store.child("adversarial").child(set_name(cells[3]))
    assert logged[1][1] == pytest.approx(write_set(cells[3], store).accuracy)
    assert sep.read_json("texts.json") == store.read_json(f"texts/{cells[3].texts_id}.json") != None  # noqa: E711
    with pytest.raises(UserError, match="none of the attacks changes images"):
        api.evaluate_models(
            ["digits"], replace(asked, attacks=asked.attacks[:1]), replace(where, out=f"{tmp_path}/new")
        )
    assert not (tmp_path / "new").exists()


def test_what_an_attack_in_memory_found_is_saved(tmp_path):
    model, data = rayclip.load("digits"), open_data("digits", "test")
    images, labels = batch_pixels(data, range(6), "native", 0) / 255, torch.from_numpy(data.labels[:6])
    found = rayclip.attack(model.zero_shot(list(data.class_names)), images, labels, "pgd:steps=2", eps="20.4/255")
    saved = found.save(str(tmp_path / "mine"))
    again = open_data(saved.place, "test")
    assert torch.equal(batch_pixels(again, range(6), "native", 0), (found.images * 255).round().byte())
    right = found.clean_logits.argmax(1) == labels
    assert (saved.samples, saved.successes) == (6, int((right & found.success).sum()))
    with torch.no_grad():
        survived = model.zero_shot(list(data.class_names))((found.images * 255).round() / 255).argmax(1) != labels
    assert saved.surviving == int((right & found.success & survived).sum())
    function = rayclip.attack(
        lambda x: x.flatten(2).mean(2) + torch.tensor([0.0, 0.01, 0.02]), images, labels % 3, "fgsm", eps="2/255"
    )
    assert function.save(str(tmp_path / "function")).samples == 6
    text = rayclip.attack(model.zero_shot(list(data.class_names)), images, labels, "bert")
    with pytest.raises(UserError, match="texts"):
        text.save(str(tmp_path / "text"))


def test_tensors_are_saved_and_judged_again(tmp_path):
    clf, labels = ZeroShot(tiny_clip(), ["cat", "dog", "owl"]), torch.tensor([0, 1, 2, 0])
    clean = torch.randint(0, 256, (4, 3, 9, 9)) / 255
    images = (clean + 0.004 * torch.randn(clean.shape)).clamp(0, 1)
    asked = []

    def predict(pixels, places):
        asked.append((pixels, places))
        return clf(pixels).argmax(1)

    def save(name, images, labels=labels):
        with torch.no_grad():
            before, after = clf(clean).argmax(1), clf(images).argmax(1)
        place, judged = str(tmp_path / name), {"before_B": before, "after_B": after, "predict": predict}
        return save_adversarial(place, images, labels, clf.class_names, **judged)

    found = save("mine", images)
    data = open_data(found.place, "test")
    saved = batch_pixels(data, range(4), "native", 0)
    assert torch.equal(saved, (images * 255).round().byte()) and data.labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(asked[-1][0], saved.float() / 255) and list(asked[-1][1]) == [0, 1, 2, 3]
    other = save("mine", clean)
    assert other.place == found.place and (other.successes, other.samples) == (0, 4)
    assert torch.equal(batch_pixels(open_data(found.place, "test"), range(4), "native", 0).float() / 255, clean)
    with pytest.raises(UserError, match="labels"):
        save("bad", images, labels + 1)

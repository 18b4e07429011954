"""Validation on held-out images: what is held out, which weights are kept, and that training does not notice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.test_data import png, write
from rayclip.attacks import parse_attacks
from rayclip.data import few_shot, open_data
from rayclip.data.digits import CLASS_NAMES
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, make_cells
from rayclip.evaluation.plan import Shard
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage
from rayclip.training import train
from rayclip.training.held_out import HeldOut, split
from rayclip.training.validation import Validator
from rayclip.types import UserError
from training.test_loop import LocalHost, config

SAID = "size=16,attacks=fgsm,pgd:steps=2,step=8/255,start=zero,eps=24/255"


def validated(said=SAID):
    held_out = None if said is None else HeldOut.parse(said, 1 / 255)
    settings = config("tecoa", validate=held_out, ema=0.5)
    return replace(settings, recipe=replace(settings.recipe, lr=3e-3))  # large steps: the last epoch is not best


def weights(spec):
    return load_model(f"local-dir:{spec}").model.state_dict()


def test_the_held_out_part_is_balanced_seeded_and_never_trained_on(tmp_path):
    labels = [0] * 20 + [1] * 6 + [2]
    data = open_data(write(tmp_path / "mine.parquet", labels, [png((i, i, i)) for i in range(27)]), "train")
    held_out = HeldOut(size=8, attacks=())
    rest, held = split(data, None, 0, held_out)
    assert sorted([*rest.ids, *held.ids]) == list(range(27))
    assert np.bincount(held.labels, minlength=3).tolist() == [5, 3, 0], "at most half of a class"
    assert np.array_equal(split(data, None, 0, held_out)[1].ids, held.ids)
    assert not np.array_equal(split(data, None, 1, held_out)[1].ids, held.ids)
    digits = open_data("digits", "train")
    rest, held = split(digits, 3, 5, HeldOut(attacks=()))
    assert rest.ids.tolist() == few_shot(digits, 3, 5).ids.tolist(), "few-shot runs train on what they always have"
    assert len(held) == 136 and set(rest.ids).isdisjoint(held.ids) and np.ptp(np.bincount(held.labels)) == 1
    assert split(digits, 3, 5, None)[1] is None
    with pytest.raises(UserError, match="hold out"):
        split(data.subset([0, 20, 26]), None, 0, held_out)


def test_the_option_is_read(tmp_path):
    found = HeldOut.parse(f"every=2,{SAID}", 1 / 255)
    assert (found.every, found.size, [a.name for a in found.attacks]) == (2, 16, ["fgsm", "pgd"])
    assert {a.eps for a in found.attacks} == {24 / 255} and found.attacks[1].start == "zero"
    (default,) = HeldOut.parse("every=1", 2 / 255).attacks
    assert default.eps == 2 / 255 and HeldOut.parse("attacks=clean", 0).attacks == ()
    for wrong in (
        "each=1",
        "every=0",
        "size=x",
        "size=-1",
        "size=1.5",
        "attacks=bert",
        "attacks=pgdd",
        "eps=8",
        "attacks=pgd,pgd:step=1/255",
    ):
        with pytest.raises(UserError):
            HeldOut.parse(wrong, 1 / 255)
    due = Validator(replace(config(), validate=found), open_data("digits", "train"), 0, 1).is_due
    assert [epoch for epoch in range(1, 6) if due(epoch, 5)] == [2, 4, 5]
    plain = config("tecoa")
    assert "validate" not in plain.describe() and plain.digest() != validated().digest()


@pytest.mark.ci
def test_the_best_epoch_is_kept_and_training_goes_on_as_without(tmp_path):
    whole, plain = LocalHost(tmp_path / "whole"), LocalHost(tmp_path / "plain")
    train(validated(), whole)
    train(validated(None), plain)
    assert whole.curve == plain.curve and not (plain.checkpoints[-1] / "best").exists()
    last = whole.checkpoints[-1]
    told = read_lineage(last)["validation"]
    assert [each["epoch"] for each in told["history"]] == [1, 2, 3] and told["images"] == 16
    by = sorted(told["history"], key=lambda each: (-each["fgsm_eps24"], -each["clean"], each["epoch"]))
    assert told["best"] == by[0]
    saved = {each["epoch"]: weights(path) for each, path in zip(told["history"], whole.checkpoints, strict=True)}
    best = weights(last / "best")
    same = [epoch for epoch, state in saved.items() if all(torch.equal(best[n], x) for n, x in state.items())]
    assert same == [told["best"]["epoch"]] != [3]

    first = LocalHost(tmp_path / "first", until=2)
    with pytest.raises(InterruptedError):
        train(validated(), first)
    second = LocalHost(tmp_path / "second", start=first.checkpoints[-1])
    train(validated(), second)
    assert read_lineage(second.checkpoints[-1])["validation"] == told
    assert all(torch.equal(best[n], x) for n, x in weights(second.checkpoints[-1] / "best").items())

    # The numbers are those of an evaluation of the same images
    _, held = split(open_data("digits", "train"), 3, 0, validated().validate)
    pictures = [png_of(image) for image in held.images(range(16))]
    data = write(tmp_path / "held.parquet", held.labels.tolist(), pictures, names=list(CLASS_NAMES))
    spec, attacks = f"local-dir:{last / 'best'}", parse_attacks("clean,fgsm,pgd:steps=2,step=8/255,start=zero", {})
    models, opened = [(spec, load_model(spec).fingerprint())], open_data(data, "test")
    cells = make_cells(models, [(data, opened)], attacks, Protocol(eps=24 / 255))
    store = Store(str(tmp_path / "results"))
    for cell in cells:
        Evaluator(store).run(Shard(cell=cell, positions=tuple(range(16))))
    rows = {row.attack: row.top1 for row in collect_rows(cells, {data: np.arange(16)}, store)}
    assert {n: v for n, v in told["best"].items() if n not in ("epoch", "step")} == pytest.approx(rows)


def png_of(image):
    import io

    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()

"""Warnings about a measurement: each is raised by what it is meant for, and by nothing else."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from rayclip.attacks import parse_attacks
from rayclip.attacks.pgd import PGD
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, make_cells, missing_shards
from rayclip.evaluation.alarms import alarms
from rayclip.models import Clip, load_model


@dataclass(frozen=True, kw_only=True)
class Scores(PGD):
    """PGD that says of itself that it uses no gradients."""

    name: ClassVar[str] = "scores"
    black_box: ClassVar[bool] = True


def measure(tmp_path, attacks, eps=32 / 255, limit=60):
    data = open_data("digits", "test")
    positions = {"digits": np.arange(limit)}
    cells = make_cells([("digits", load_model("digits").fingerprint())], [("digits", data)], attacks, Protocol(eps=eps))
    store = Store(str(tmp_path))
    for cell in cells:
        for shard in missing_shards(cell, positions["digits"], store, limit):
            Evaluator(store).run(shard)
    rows = collect_rows(cells, positions, store)
    return alarms(cells, rows, positions, store)


DEFAULTS = {"steps": 10, "step": 8 / 255, "substitutes": "clip-table"}


def test_an_honest_measurement_raises_no_alarm(tmp_path):
    attacks = parse_attacks("clean,pgd,pgd:steps=30,bert,sep", DEFAULTS)
    assert measure(tmp_path, attacks) == []
    assert (
        measure(tmp_path / "huge", parse_attacks("pgd", DEFAULTS | {"steps": 50, "step": 32 / 255}), eps=254 / 255)
        == []
    )


def test_masked_gradients_are_noticed(tmp_path, monkeypatch):
    """A model that rounds its input has gradients of zero and is no better for it."""
    encode = Clip.encode_image
    monkeypatch.setattr(Clip, "encode_image", lambda clip, x, **how: encode(clip, torch.round(x * 16) / 16, **how))
    start_at_the_image = parse_attacks("pgd:start=zero", DEFAULTS)
    (said,) = measure(tmp_path, start_at_the_image)
    assert "hardly lowers the margin" in said and "digits on digits, pgd-10_eps32" in said


def test_an_attack_that_sees_less_and_breaks_more_is_noticed(tmp_path):
    weak, strong = PGD(steps=1, step=1 / 255, start="zero"), Scores(steps=10, step=8 / 255)
    (said,) = measure(tmp_path, [weak, strong])
    assert "scores-10_eps32 needs no gradients" in said and "pgd-1_eps32" in said


def test_more_steps_that_break_less_are_noticed(tmp_path):
    (said,) = measure(tmp_path, [PGD(steps=10, step=8 / 255), PGD(steps=30, step=0.1 / 255, start="zero")])
    assert "pgd-30_eps32 leaves" in said and "more than pgd-10_eps32 with fewer steps" in said


def test_surviving_any_budget_is_noticed(tmp_path):
    (said,) = measure(tmp_path, [PGD(steps=1, step=2 / 255, start="zero")], eps=254 / 255)
    assert "survive a budget that can erase any image" in said


@pytest.mark.parametrize("broken", ["constant", "nan"])
def test_a_model_without_an_opinion_is_an_error(tmp_path, monkeypatch, broken):
    encode = Clip.encode_image
    value = 0.0 if broken == "constant" else float("nan")
    monkeypatch.setattr(Clip, "encode_image", lambda clip, x, **how: encode(clip, x, **how) * value)
    with pytest.raises(FloatingPointError, match="same logit" if broken == "constant" else "not finite"):
        measure(tmp_path, parse_attacks("pgd", DEFAULTS))

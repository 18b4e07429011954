"""The classes that the rooms' README files add work as they are written there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from conftest import tiny_clip
from methods.test_losses import attacked, example
from rayclip.attacks.base import Attack
from rayclip.defenses import Defended
from rayclip.defenses.base import Defense
from rayclip.methods import Method
from rayclip.models import ZeroShot
from rayclip.models.scorers import Scorer
from rayclip.rng import sample_keys

ROOMS = Path(__file__).resolve().parents[1] / "rayclip"


def written(room: str) -> type:
    """The class that a room's README adds, with nothing but what stands there."""
    text = (ROOMS / room / "README.md").read_text()
    (code,) = (b for b in re.findall(r"(?:^(?:    .*)?\n)+", text, flags=re.MULTILINE) if "@dataclass" in b)
    space: dict = {"__name__": "readme"}
    exec(textwrap.dedent(code), space)
    (kind,) = (x for x in space.values() if isinstance(x, type) and x.__module__ == "readme")
    return kind


def test_the_attack():
    kind = written("attacks")
    assert issubclass(kind, Attack) and kind.settings()["steps"] is int


def test_the_method_lowers_what_its_attack_raises():
    kind = written("methods")
    chosen = kind.with_settings({"power": 2, "eps": 8 / 255, "steps": 2})
    assert isinstance(chosen, Method)
    clip = tiny_clip(dtype=torch.float64)
    batch = example(clip, 4)
    clean, _ = chosen.loss(clip, type(batch)(**{**vars(batch), "adversarial_BCHW": batch.pixels_BCHW}))
    loss, shown = chosen.loss(clip, attacked(clip, chosen, batch))
    assert loss > clean and shown["loss"] == loss and loss.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_defence_divides_the_logits(temperature):
    defense = written("defenses").with_settings({"temperature": temperature})
    assert isinstance(defense, Defense)
    victim, pixels = ZeroShot(tiny_clip(), ["cat", "dog"]), torch.rand(3, 3, 8, 8)
    behind = Defended(victim, (defense,), sample_keys(range(3), 0))
    assert torch.allclose(behind(pixels), victim(pixels) / temperature)


def test_the_scorer_has_two_prompts_per_class():
    scorer = written("models")()
    assert isinstance(scorer, Scorer)
    classifier = scorer.classifier(tiny_clip(), ["cat", "guinea_pig"], "{}")
    assert classifier.prompts == ["a cat", "many cats", "a guinea pig", "many guinea pigs"]
    assert classifier(torch.rand(2, 3, 8, 8)).shape == (2, 2)

"""What CONTRIBUTING.md and the entry points promise: an attack in ten lines, and one from another package."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attacks.test_gradient import balanced, batch
from rayclip.attacks import ATTACKS, Samples, parse_attacks
from rayclip.attacks.pgd import PGD


def example() -> type:
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space = {
        "PGD": PGD,
        "dataclass": dataclass,
        "ClassVar": ClassVar,
        "Tensor": Tensor,
        "torch": torch,
        "__name__": "x",
    }
    exec(code, space)
    return space["CW"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_the_example_is_the_packages_own_file(page):
    root = Path(__file__).resolve().parents[1]
    (code,) = re.findall(r"```python\n(.*?)```", (root / page).read_text(), re.DOTALL)
    assert (root / "rayclip/attacks/cw.py").read_text().endswith(code)


def test_the_attack_of_contributing_works(monkeypatch):
    monkeypatch.setitem(ATTACKS._own, "cw", example())
    (attack,) = parse_attacks("cw:steps=20,step=2/255", {})
    assert attack.label == "cw-20"
    victim = balanced()
    images, labels, todo, keys = batch(victim)
    result = attack.run(victim, Samples(images, labels, keys, todo), eps=8 / 255)
    with torch.no_grad():
        right = victim(result.images_BCHW).argmax(1) == labels
    assert right.float().mean() < 0.5
    assert (result.images_BCHW - images).abs().max() <= 8 / 255 + 1e-6

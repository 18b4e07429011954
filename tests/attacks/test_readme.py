"""The attack that the README of the attacks adds in ten lines."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from attacks.test_gradient import balanced, batch
from rayclip.attacks import ATTACKS, Samples, parse_attacks
from rayclip.attacks.pgd import PGD

README = Path(__file__).resolve().parents[2] / "rayclip" / "attacks" / "README.md"


def example() -> type:
    """The attack that the README of the attacks writes down."""
    (code,) = re.findall(r"^    @dataclass(?:.*\n|\n)*?(?=^\S)", README.read_text(), flags=re.MULTILINE)
    space = {
        "PGD": PGD,
        "dataclass": dataclass,
        "ClassVar": ClassVar,
        "Tensor": Tensor,
        "torch": torch,
        "__name__": "x",
    }
    exec(textwrap.dedent(code), space)
    return space["CW"]


def test_the_attack_of_the_readme_works(monkeypatch):
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

"""A package of somebody else adds one of each kind, by what the rooms' README files say; the command line uses them."""

import json
import os
import subprocess
import sys

import pytest

from calling import call

MODULE = '''
"""Somebody's own: an attack with captions, a method with two settings, a defence, a scorer, a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rayclip.attacks.base import Adversarial, GradientAttack
from rayclip.data.images import ImageSet
from rayclip.data.registry import DatasetInfo
from rayclip.defenses.base import Defense
from rayclip.methods.base import Method, Recipe
from rayclip.methods.losses import class_cross_entropy
from rayclip.methods.parallel import global_mean
from rayclip.models.scorers import Scorer
from rayclip.models.zeroshot import SeveralPrompts, clean_name
from rayclip.settings import FILLED_IN


@dataclass(frozen=True, kw_only=True)
class FromCaptions(GradientAttack):
    """moves an image away from the captions of its class"""

    name: ClassVar[str] = "from-captions"

    captions: str = ""
    texts: tuple[tuple[str, ...], ...] = field(default=(), repr=False, metadata=FILLED_IN)

    def captions_needed(self, bundled):
        return "" if self.texts else self.captions or bundled

    def with_texts(self, texts, class_names=(), captions=""):
        return replace(self, texts=tuple(map(tuple, texts)))

    def more_texts(self, class_names):
        return self.texts

    def describe(self):
        return super().describe() | {"captions": hashlib.sha256(repr(self.texts).encode()).hexdigest()[:16]}

    def craft(self, victim, samples, *, eps, prompts=None):
        with torch.no_grad():
            own_KD = torch.stack([victim.clip.embed_texts(own).mean(0) for own in self.texts])

        def forward(pixels, index):
            image_AD = victim.embed(pixels, index)
            away = -(image_AD * own_KD[samples.labels_B[index]]).sum(-1)
            return away, victim.logits(image_AD).argmax(1) != samples.labels_B[index]

        images, steps, queries = self.ascend(forward, samples, eps=eps)
        return Adversarial(images, None, steps, queries)


@dataclass(frozen=True, kw_only=True)
class Sharpened(Method):
    """cross-entropy at a power, against PGD on it"""

    name: ClassVar[str] = "sharpened"
    recipe: ClassVar[Recipe] = Recipe(optimizer="sgd", lr=1e-4)

    power: int = 1
    form: Literal["mean", "scaled"] = "mean"

    def attack(self, clip, batch):
        text_KD = batch.texts.all().detach()
        return self.perturb(clip, batch, lambda pixels: self.terms(clip, pixels, text_KD, batch.labels_B))

    def loss(self, clip, batch):
        terms_B = self.terms(clip, batch.adversarial_BCHW, batch.texts.all(), batch.labels_B)
        loss = global_mean(terms_B, batch.total) * (2 if self.form == "scaled" else 1)
        return loss, {"loss": loss.detach()}

    def terms(self, clip, pixels, text_KD, labels_B):
        return class_cross_entropy(clip.encode_image(pixels), text_KD, labels_B, clip.scale) ** self.power


@dataclass(frozen=True, kw_only=True)
class LeastFirst(Defense):
    """turns the order of the classes around, three times"""

    name: ClassVar[str] = "least-first"
    smooth: ClassVar[bool] = True

    factor: float = 1.0

    def embeddings(self, victim, image_BVD, keys_B):
        return -image_BVD

    def class_weights(self, victim, image_BVD, text_KD):
        return -text_KD.expand(len(image_BVD), -1, -1)

    def logits(self, logits_BK):
        return -self.factor * logits_BK


@dataclass(frozen=True, kw_only=True)
class Plural(Scorer):
    """one and many of a class"""

    name: ClassVar[str] = "plural"

    ending: str = "s"

    def prompts(self, class_names, template):
        return [[f"a {clean_name(name)}", f"many {clean_name(name)}{self.ending}"] for name in class_names]

    def classifier(self, clip, class_names, template):
        return SeveralPrompts(clip, class_names, self.prompts(class_names, template), template)


class Squares(ImageSet):
    def __init__(self, split: str) -> None:
        self.name, self.class_names = "squares", ("dark square", "light square")
        self.raw_names, self.native_size = self.class_names, (8, 8)
        self.labels = np.arange(20 if split == "train" else 8) % 2
        self.ids = np.arange(len(self.labels))
        self.fingerprint = f"squares-{split}-1"

    def images(self, positions: Sequence[int]):
        return [Image.new("RGB", (8, 8), (60 + 120 * int(self.labels[p]) + int(p),) * 3) for p in positions]


squares = DatasetInfo(
    name="squares",
    title="Squares",
    splits={"train": 20, "test": 8},
    evaluated="test",
    classes=2,
    resize="square",
    licence="none",
    citation="nobody",
    open=Squares,
)
'''
ENTRY_POINTS = """
[rayclip.attacks]
from-captions = theirs:FromCaptions
[rayclip.methods]
sharpened = theirs:Sharpened
[rayclip.defenses]
least-first = theirs:LeastFirst
[rayclip.scorers]
plural = theirs:Plural
[rayclip.datasets]
squares = theirs:squares
"""
CAPTIONS = "\n".join(
    [
        "class_index,class_name,caption",
        "0,dark square,a dark square",
        "0,dark square,a shadow",
        "1,light square,a square",
    ]
)
EVAL = ("--data", "squares", "--eps", "8/255", "--class-names", "raw")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """The package, installed as pip leaves it, for this process and for those that it starts."""
    place = tmp_path / "site"
    about = place / "theirs-1.0.dist-info"
    about.mkdir(parents=True)
    (place / "theirs.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "captions.csv").write_text(CAPTIONS)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("theirs", None)


def test_they_are_listed_checked_and_planned_as_our_own(theirs, monkeypatch, capsys):
    assert "moves an image away from the captions of its class" in call(monkeypatch, capsys, "attacks")[1]
    assert "turns the order of the classes around" in call(monkeypatch, capsys, "defenses")[1]
    for option, value, says in (
        ("--attacks", "from-captions:stepz=3", "did you mean step"),
        ("--defense", "least-first:factor=much", "no number"),
        ("--scorer", "plural:endings=s", "did you mean ending"),
    ):
        code, _, err = call(monkeypatch, capsys, "eval", "--model", "digits", *EVAL, "--out", "r", option, value)
        assert code == 2 and says in err
    train = ("train", "--model", "digits", "--data", "squares", "--out", "m", "--method")
    for method, says in (("sharpened:form=other", "mean, scaled"), ("sharpened:powr=2", "did you mean power")):
        code, _, err = call(monkeypatch, capsys, *train, method)
        assert code == 2 and says in err
    assert not (theirs / "r").exists() and not (theirs / "m").exists()


@pytest.mark.e2e
def test_all_five_work_together_through_the_command_line(theirs):
    def run(*args):
        done = subprocess.run(
            [sys.executable, "-m", "rayclip", *args, "--quiet"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    small = ("--epochs", "2", "--batch-size", "10", "--steps", "2", "--eps", "8/255", "--no-tracking")
    where = ("--model", "digits", "--data", "squares", "--class-names", "raw", "--out", "m")
    run("train", "--method", "sharpened:power=2,form=scaled", *where, *small)
    config = json.loads((theirs / "m" / "rayclip.json").read_text())["config"]["method"]
    assert (config["name"], config["power"], config["form"]) == ("sharpened", 2, "scaled")
    attacks = "clean,from-captions:captions=captions.csv,steps=3"
    options = ("--attacks", attacks, "--defense", "none,least-first", "--scorer", "template,plural", "--no-tracking")
    run("eval", "--model", "digits,local-dir:m", *EVAL, *options, "--workers", "1", "--json", "rows.json", "--out", "r")
    rows = json.loads((theirs / "rows.json").read_text())
    found = {(r["model"], r["scorer"], r["defense"], r["attack"]): r["top1"] for r in rows}
    assert len(found) == len(rows) == 2 * 2 * (2 + 4), (
        "behind a defence attacks ignore it or go through it; the worst case of both"
    )
    for model in ("digits", "local-dir:m"):
        for scorer in ("template", "plural"):
            clean = {d: found[model, scorer, d, "clean"] for d in ("none", "least-first")}
            assert clean["none"] + clean["least-first"] == 100, "of two classes the other one"
    protocol = next(r["protocol"] for r in rows if r["attack"].startswith("from-captions"))
    assert protocol["attack"] == "from-captions" and protocol["steps"] == 3 and len(protocol["captions"]) == 16
    run("report", "r", "--out", "report.md")
    text = (theirs / "report.md").read_text()
    assert "from-captions-3" in text and "least-first" in text and "plural" in text

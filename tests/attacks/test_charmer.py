"""Charmer against every one-character edit, and what it promises of every text."""

import re

import pytest
import torch

import naive
from conftest import tiny_clip
from rayclip.attacks import make_attack
from rayclip.attacks.charmer import CHARACTERS, edit
from rayclip.types import UserError

TEXTS = ["a cat", "Dogs!", "oo", "x"]
EVERYWHERE = 10_000


def test_the_edits_are_all_texts_one_character_away():
    for text in [*TEXTS, "a  b", ""]:
        found = {edit(text, place, c) for place in range(2 * len(text) + 1) for c in CHARACTERS}
        assert found == {text, *naive.edits(text, naive.CHARACTERS)}


@pytest.mark.parametrize("objective", ["kl", "squared"])
def test_at_all_places_it_finds_what_brute_force_finds(objective):
    clip = tiny_clip(dtype=torch.float64)
    made, few = (make_attack("charmer", n=n, objective=objective).attack(clip, TEXTS) for n in (EVERYWHERE, 1))
    for text, best, quick in zip(TEXTS, made, few, strict=True):
        every = [text, best, quick, *sorted(naive.edits(text, naive.CHARACTERS))]
        with torch.no_grad():
            raw = clip.encode_text(clip.tokenize(every), normalize=False)
        if objective == "kl":
            p, q = (naive.unit(raw[0]).log_softmax(0), (raw / raw.norm(dim=1, keepdim=True)).log_softmax(1))
            gains = (p.exp() * (p - q)).sum(1).tolist()
        else:
            gains = (raw - raw[0]).pow(2).sum(1).tolist()
        assert gains[1] == pytest.approx(max(gains), rel=1e-9) and gains[1] >= gains[2] > 0
        assert naive.edit_distance(text, best) == 1
    assert made != few


LONG = (
    "this cat is on a mat by the sea and the sun is hot while rain falls over green hills near old towns where men live"
)


@pytest.mark.parametrize("settings", [{"k": 2}, {"k": 2, "objective": "squared", "constrain": True}], ids=str)
def test_what_it_promises(settings):
    """At most k characters change, whatever else is attacked beside a text; more edits move it farther; nothing changes
    where the model does not read."""
    clip = tiny_clip(dtype=torch.float64)
    texts = [*TEXTS, LONG]
    attack = make_attack("charmer", n=2, **settings)
    made = attack.attack(clip, texts)
    assert made == [attack.attack(clip, [text])[0] for text in texts] == attack.attack(clip, texts[::-1])[::-1]
    with torch.no_grad():
        moved = (clip.embed_texts(made) - clip.embed_texts(texts)).norm(dim=1) > 1e-6
    for text, changed, far in zip(texts, made, moved.tolist(), strict=True):
        assert naive.edit_distance(text, changed) <= attack.k and far == (text != changed)
    assert made[-1] != LONG and made[-1].endswith(LONG[60:])
    if attack.constrain:
        words = {w.removesuffix("</w>") for w in clip.vocabulary if re.fullmatch("[a-z]{2,}</w>", w)}
        for text, changed in zip(texts, made, strict=True):
            before, after = (len(words.intersection(re.findall("[a-z]+", t.lower()))) for t in (text, changed))
            assert after < before or changed == text
        assert "x" in made, "which has no word to lose"
    else:
        assert max(map(naive.edit_distance, texts, made)) == attack.k


def test_a_constraint_needs_words():
    clip = tiny_clip()
    clip._tokenizer = lambda texts: torch.zeros(len(texts), 16, dtype=torch.int64)
    make_attack("charmer").check(clip)
    with pytest.raises(UserError, match="leave constrain away"):
        make_attack("charmer:constrain=true").check(clip)

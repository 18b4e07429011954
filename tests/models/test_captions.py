"""SAFT's filter against a naive one."""

import json

import pytest
import torch

from rayclip.data import open_data
from rayclip.data.captions import read_captions
from rayclip.data.descriptions import match_classes, read_descriptions
from rayclip.models import load_model
from rayclip.models.captions import FILL_TEMPLATES, check_enough, nearest_captions
from rayclip.models.zeroshot import clean_name
from rayclip.types import UserError

NAMES = ["Tabby_Cat", "dog", "dog"]
CAPTIONS = [
    ["a striped cat with fur", "a cat", "something else entirely", "tabby cats purr"],
    ["a dog that barks", "a wolf", "a leash"],
    ["a leash", "a wolf", "a dog that barks"],
]


def naive(clip, names, captions, keep):
    """Class by class, cosines in float64."""

    def embed(texts):
        with torch.no_grad():
            rows = clip.encode_text(clip.tokenize(texts), normalize=False).double()
        return [row / row.square().sum().sqrt() for row in rows]

    chosen = []
    for name, own in zip(names, captions, strict=True):
        anchor, *rows = embed([clean_name(name), *own])
        scores = [float(sum(row * anchor)) for row in rows]
        order = sorted(range(len(own)), key=lambda i: -scores[i])[:keep]
        chosen.append([(own[i], scores[i]) for i in order])
    return chosen


def same(chosen, expected):
    assert [[s.caption for s in own] for own in chosen] == [[text for text, _ in own] for own in expected]
    for own, theirs in zip(chosen, expected, strict=True):
        assert [s.score for s in own] == pytest.approx([score for _, score in theirs], abs=2e-6)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_nearest_are_kept(clip, keep):
    same(nearest_captions(clip, NAMES, CAPTIONS, keep), naive(clip, NAMES, CAPTIONS, keep))


def test_a_shared_name_gets_the_same_captions_and_ties_keep_the_order_of_the_file(clip):
    first, second = nearest_captions(clip, ["dog", "dog"], CAPTIONS[1:], 3)
    assert first == second, "nothing ties here, so the order in the file does not matter"
    tied = ["A DOG", "a wolf", "a dog", "a  dog"]  # CLIP's tokenizer reads three of them alike
    for own in (tied, tied[::-1]):
        kept = [s.caption for s in nearest_captions(clip, ["dog"], [own], 4)[0]]
        alike = [text for text in kept if text != "a wolf"]
        assert alike == [text for text in own if text != "a wolf"]


def test_real_descriptions_and_a_real_model(shared):
    clip = load_model(f"local-dir:{shared / 'models' / 'pocket-clip'}")
    names = open_data(str(shared / "data" / "cifar10-test.parquet"), "test").class_names
    described = read_descriptions(str(shared / "data" / "descriptions" / "cupl-cifar10.json"))
    captions = match_classes(described.sentences, names).captions
    chosen = nearest_captions(clip, names, captions, 5)
    written = json.loads((shared / "data" / "descriptions" / "cupl-cifar10.json").read_text())
    unique = [list(dict.fromkeys(written[name])) for name in names]
    expected = naive(clip, names, unique, 5)
    for own, theirs in zip(chosen, expected, strict=True):
        assert [s.score for s in own] == pytest.approx([score for _, score in theirs], abs=2e-6)
        rest = {text for text, _ in theirs}
        assert all(s.caption in rest or abs(s.score - theirs[-1][1]) < 2e-6 for s in own)


def test_too_few_captions_are_an_error_that_names_the_classes(clip):
    with pytest.raises(UserError, match=r"2 of 3.*dog"):
        nearest_captions(clip, NAMES, CAPTIONS, 4)
    many = [f"class {i}" for i in range(9)]
    with pytest.raises(UserError, match=r"class 4.*4 more"):
        check_enough(many, [[]] * 9, 1, fill=False)


def test_templates_fill_up_when_asked_for(clip):
    chosen = nearest_captions(clip, ["Tabby_Cat", "dog"], [CAPTIONS[0], ["a wolf"]], 4, fill=True)
    assert [s.filled for s in chosen[0]] == [False] * 4
    assert [s.filled for s in chosen[1]] == [False, True, True, True]
    assert [s.caption for s in chosen[1]] == ["a wolf", *(t.format("dog") for t in FILL_TEMPLATES[:3])]
    prompts = [naive(clip, ["dog"], [[t.format("dog")]], 1)[0][0] for t in FILL_TEMPLATES[:3]]
    same([chosen[1][1:]], [prompts])


def test_a_template_that_is_a_caption_already_is_not_taken_twice(clip):
    own = [FILL_TEMPLATES[0].format("dog")]
    kept = [s.caption for s in nearest_captions(clip, ["dog"], [own], 3, fill=True)[0]]
    assert len(set(kept)) == 3


def test_templates_run_out(clip):
    assert len(set(FILL_TEMPLATES)) == len(FILL_TEMPLATES)
    with pytest.raises(UserError, match=f"{len(FILL_TEMPLATES)}"):
        nearest_captions(clip, ["dog"], [[]], len(FILL_TEMPLATES) + 1, fill=True)


def test_progress_ends_at_the_number_of_different_texts(clip):
    told = []
    nearest_captions(clip, NAMES, CAPTIONS, 1, progress=lambda *done: told.append(done))
    assert told == [(2 + 4 + 3, 2 + 4 + 3)]


def test_the_bundled_models_context_holds_the_bundled_captions():
    tokens = load_model("digits").tokenize([text for own in read_captions("digits") for text in own])
    assert len(tokens) == 80 and tokens.shape[1] < 16

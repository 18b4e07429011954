"""What a bounded memory computes again, and that the tokens of texts are among what it keeps."""

import torch

from conftest import tiny_clip
from rayclip.attacks.bert import TextSettings
from rayclip.models.remembered import Remembered


def test_a_value_is_computed_once_and_the_memory_stays_bounded():
    asked = []

    def square(keys):
        asked.append(list(keys))
        return [key * key for key in keys]

    remembered = Remembered(square, most=3)
    assert remembered([2, 3, 2]) == [4, 9, 4] and remembered([3]) == [9]
    assert remembered([3, 4]) == [9, 16]
    assert asked == [[2, 3], [4]]
    assert remembered([5, 3]) == [25, 9]  # a fourth value: the memory starts anew
    assert remembered([6, 7, 8, 9, 6]) == [36, 49, 64, 81, 36]  # more than it may keep
    assert remembered([]) == [] and asked[2:] == [[5, 3], [6, 7, 8, 9]]
    remembered([6])
    assert asked[-1] == [6]


class Counted:
    """A tokenizer that notes what it was asked for."""

    def __init__(self, inner):
        self.inner, self.texts = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, texts, *args):
        self.texts += texts
        return self.inner(texts, *args)


def test_a_text_attack_tokenizes_a_sentence_once_and_finds_the_same():
    clip, again = tiny_clip(), tiny_clip()
    clip._tokenizer = Counted(clip._tokenizer)
    prompts = [f"This is a photo of a {name}" for name in ("cat", "polar bear", "dog")]
    settings = TextSettings(substitutes="clip-table")
    first = settings.attack(clip, prompts)
    assert len(clip._tokenizer.texts) == len(set(clip._tokenizer.texts)) > len(prompts)
    clip._tokenizer.texts.clear()
    assert settings.attack(clip, prompts[::-1]) == first[::-1] == settings.attack(again, prompts)[::-1]
    assert clip._tokenizer.texts == []


def test_candidates_follow_weights_that_are_trained():
    clip, settings = tiny_clip(), TextSettings(substitutes="clip-table")
    before = settings.source(clip).candidates([["cat", "dog"]])
    assert settings.source(clip) is settings.source(clip)
    with torch.no_grad():
        clip.token_table.normal_()
    after = settings.source(clip).candidates([["cat", "dog"]])
    assert before != after == TextSettings(substitutes="clip-table").source(tiny_of(clip)).candidates([["cat", "dog"]])


def tiny_of(clip):
    """Another model with the same weights."""
    other = tiny_clip()
    other.load_state_dict(clip.state_dict())
    return other

"""Texts that are longer than a model's context: found with whatever tokenizer it has."""

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer
from transformers import BertTokenizer

from conftest import tiny_clip
from rayclip.models.cutting import find_cut
from rayclip.models.prompts import WithContext

WORDS = st.sampled_from(["cat", "dog", "!", "!!!!!", "photo of", "ﷺ", "&amp;", "naïve", "zwölfeckig", "'s", "", "\n"])
ROOM = 16
OWN = open_clip.SimpleTokenizer(context_length=ROOM)


@given(st.lists(st.lists(WORDS, max_size=30).map(" ".join), max_size=8))
def test_clips_own_tokenizer(texts):
    assert find_cut(OWN, texts, ROOM) == [t for t in dict.fromkeys(texts) if len(OWN.encode(t)) + 2 > ROOM]


def test_the_last_token_that_fits_and_the_first_that_does_not():
    assert find_cut(OWN, ["cat " * (ROOM - 2)], ROOM) == []
    assert find_cut(OWN, ["cat " * (ROOM - 1)], ROOM) == ["cat " * (ROOM - 1)]


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of cat dog ##s ! un ##like"
    (folder / "vocab.txt").write_text(vocabulary.replace(" ", "\n"))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("end_is_padding", [False, True])
def test_a_tokenizer_of_transformers(word_pieces, side, end_is_padding):
    tokenizer = HFTokenizer(word_pieces, context_length=ROOM)
    tokenizer.tokenizer.padding_side = side
    if end_is_padding:  # as SigLIP's
        tokenizer.tokenizer.pad_token = tokenizer.tokenizer.sep_token
    texts = [" ".join(["a photo of dogs"] * n) + end for n in range(6) for end in ("", " !", " unlike cat", " ??? a")]
    lengths = {t: len(tokenizer.tokenizer(tokenizer.clean_fn(t))["input_ids"]) for t in texts}
    assert min(lengths.values()) < ROOM < max(lengths.values()) and ROOM in lengths.values()
    assert find_cut(tokenizer, texts, ROOM) == [t for t in texts if lengths[t] > ROOM]


def test_a_model_knows_its_room(clip):
    assert clip.room == ROOM
    texts = ["a cat", "house " * 15, "house " * 14, "a cat", "house " * 15]
    assert clip.cut_texts(texts) == ["house " * 15], "each different text once"
    assert clip.cut_texts([]) == []


def test_a_learned_context_takes_of_the_room(clip):
    """A text is cut exactly where its embedding no longer depends on its last word."""
    learned = WithContext.begin(clip, 4, 0)
    assert learned.room == ROOM - 4
    for words in (9, 10, 11):
        fits, longer = "house " * words + "cat", "house " * words + "dog"
        same = (learned.embed_texts([fits]) - learned.embed_texts([longer])).abs().max() < 1e-6
        assert bool(learned.cut_texts([fits])) == bool(same), words


def test_a_context_of_another_length():
    text = {"context_length": 10, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    clip = tiny_clip(text_cfg=text)
    clip._tokenizer = open_clip.SimpleTokenizer(context_length=10)
    assert clip.cut_texts(["house " * 8, "house " * 9]) == ["house " * 9]

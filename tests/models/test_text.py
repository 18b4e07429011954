"""A causal text tower run only as far as its texts reach, and once for what they share, gives what open_clip gives for
each text at full length."""

import random

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from transformers import BertConfig

from conftest import TINY, text_rows, tiny_clip
from rayclip.models import Clip
from rayclip.models.text import causal_tower

TEXTS = ["a cat", "This is a photo of a dog", "", "a cat", "house " * 30]
EOS = {"pool_type": "eos", "eos_id": 49407}
PLAIN = TINY["model_cfg"]["text_cfg"]


def with_text(kind, **changes):
    config = {**TINY, "model_cfg": {**TINY["model_cfg"], "text_cfg": {**PLAIN, **changes}}}
    torch.manual_seed(0)
    model = kind(16, config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"])
    for name, p in model.named_parameters():
        if "token_embedding" in name or "positional" in name:
            p.data.mul_(20)
    return Clip(model, config, open_clip.SimpleTokenizer(context_length=16), "tiny").double().eval()


@pytest.mark.parametrize("changes", [{}, EOS, {"proj_bias": True}, {"qk_norm": True}, {"pool_type": "last"}], ids=str)
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("texts", [TEXTS[:4], TEXTS], ids=["short", "long"])
def test_the_same_embeddings_and_gradients_as_at_full_length(kind, changes, texts):
    clip = with_text(kind, **changes)
    weights = torch.randn(len(texts), 16, dtype=torch.float64)

    def gradients(embedded):
        clip.zero_grad()
        (embedded * weights).sum().backward()
        return {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}

    full = clip.model.encode_text(open_clip.SimpleTokenizer(context_length=16)(texts), normalize=True)
    expected = gradients(full)
    for ours in (clip.embed_texts(texts, chunk=2), clip.encode_text(clip.tokenize(texts))):
        assert (ours - full).abs().max() < 1e-12
        found = gradients(ours)
        assert found.keys() == expected.keys() and any("positional" in name for name in found)
        largest = max(g.abs().max() for g in expected.values())
        assert max((found[name] - expected[name]).abs().max() for name in found) < 1e-12 * max(1, largest)
    raw = clip.encode_text(clip.tokenize(texts), normalize=False)
    assert (raw - clip.model.encode_text(clip._tokenizer(texts), normalize=False)).abs().max() < 1e-12


def test_rows_are_as_long_as_the_longest_text_and_equal_texts_are_encoded_once(clip):
    assert clip.tokenize(TEXTS[:2]).shape == (2, 9)
    with torch.no_grad(), text_rows(clip) as seen:
        clip.embed_texts([*TEXTS, *TEXTS[::-1]])
        assert seen == [(3, 16)], "a row for 'house', one for the empty text, and one for two texts"
    assert clip.embed_texts([]).shape == (0, 16)


def test_texts_that_begin_alike_share_rows(clip):
    prompts = [f"This is a photo of a {word}" for word in ("cat", "dog", "truck", "house", "tree", "lemon")]
    with torch.no_grad(), text_rows(clip) as seen:
        clip.embed_texts(prompts)
    assert seen == [(2, 7 + 4 * 2)]


def test_any_texts_can_share_rows():
    """A random forest of texts, many of which begin alike and some of which begin others."""
    random_ = random.Random(0)
    texts = ["cat"]
    for _ in range(200):
        kept = random_.choice(texts).split()
        texts.append(" ".join([*kept[: random_.randint(0, len(kept))], *random_.choices("a the cat dog".split(), k=3)]))
    clip = tiny_clip(dtype=torch.float64)
    with torch.no_grad(), text_rows(clip) as seen:
        found = clip.embed_texts(texts, chunk=8)
    assert max(width for _, width in seen) == 16 and sum(count for count, _ in seen) < 100
    assert (found - clip.model.encode_text(clip._tokenizer(texts), normalize=True)).abs().max() < 1e-12


@pytest.mark.parametrize("changes", [{"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}], ids=str)
def test_other_towers_keep_their_full_length(changes):
    clip = with_text(CustomTextCLIP, **changes)
    assert clip.tokenize(["a cat"]).shape == (1, 16)
    expected = clip.model.encode_text(clip._tokenizer(TEXTS), normalize=True)
    assert (clip.embed_texts(TEXTS) - expected).abs().max() < 1e-12


def test_a_tower_of_transformers_keeps_its_full_length(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertConfig(vocab_size=50000, **small).save_pretrained(tmp_path)
    clip = with_text(
        CustomTextCLIP, hf_model_name=str(tmp_path), hf_model_pretrained=False, hf_pooler_type="cls_pooler"
    )
    assert causal_tower(clip.model) is None and clip.tokenize(["a cat"]).shape == (1, 16)

"""Learned tokens in the blocks of both towers: where they stand, and that they are kept and copied."""

import pytest
import torch

from conftest import tiny_clip
from rayclip.models import fast_copy, load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.models.coupled import WithCoupledTokens
from rayclip.types import UserError

VISION = {"image_size": 8, "layers": 4, "width": 48, "head_width": 16, "patch_size": 4}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}


def learned(tokens, depth, **changes):
    """Not as they begin, where the maps of the further blocks are alike."""
    clip = WithCoupledTokens.begin(tiny_clip(dtype=torch.float64, **changes), tokens, depth, seed=0)
    with torch.no_grad():
        clip.learned.add_(torch.randn(clip.learned.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return clip


def plain_tokens(clip, count, depth):
    """Each block's tokens, text's and image's, read from the flat tensor one after the other."""
    values, found = list(clip.learned), []

    def take(*shape):
        own = torch.stack([values.pop(0) for _ in range(torch.Size(shape).numel())])
        return own.view(shape)

    words, weight, bias = take(count, 32), take(48, 32), take(48)
    found.append((words, torch.stack([weight @ word + bias for word in words])))
    for _ in range(1, depth):
        images, weight, bias = take(count, 48), take(32, 48), take(32)
        found.append((torch.stack([weight @ image + bias for image in images]), images))
    assert not values
    return found


def plain_image(clip, pixels_CHW, tokens):
    tower = clip.model.visual
    patches = tower.conv1(((pixels_CHW - clip.mean[0]) / clip.std[0])[None])[0].flatten(1).T
    x = torch.cat([tower.class_embedding[None], patches]) + tower.positional_embedding
    x = tower.ln_pre(torch.cat([x, tokens[0][1]]))
    for i, block in enumerate(tower.transformer.resblocks):
        if 0 < i < len(tokens):
            x = torch.cat([x[:5], tokens[i][1]])
        x = block(x[None])[0]
    return tower.ln_post(x[0]) @ tower.proj


def plain_text(clip, text, tokens):
    model, row = clip.model, clip.token_rows([text])[0]
    end, count = int(row.argmax()), len(tokens[0][0])
    x = model.token_embedding(row[: end + 1])
    x = torch.cat([x[:1], tokens[0][0], x[1 + count :]]) + model.positional_embedding[: end + 1]
    for i, block in enumerate(model.transformer.resblocks):
        if 0 < i < len(tokens):
            x = torch.cat([x[:1], tokens[i][0], x[1 + count :]])
        x = block(x[None], attn_mask=model.attn_mask[: end + 1, : end + 1])[0]
    return model.ln_final(x[end]) @ model.text_projection


@pytest.mark.parametrize(("count", "depth", "asked"), [(2, 3, 9), (3, 2, 2), (1, 1, 1)])
def test_tokens_stand_in_the_first_blocks_of_both_towers(count, depth, asked):
    clip = learned(count, asked, vision_cfg=VISION, text_cfg=TEXT)
    tokens = plain_tokens(clip, count, depth)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    texts = ["a photo of a cat", "a photo of a lemon tree"]
    expected = torch.stack(
        [*(plain_image(clip, x, tokens) for x in pixels), *(plain_text(clip, t, tokens) for t in texts)]
    )
    embedded = clip.encode_image(pixels, normalize=False), clip.encode_text(clip.tokenize(texts), normalize=False)
    found = torch.cat(embedded)
    assert torch.allclose(found, expected, atol=1e-9)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for wanted in (clip.learned, pixels):
        ours, plain = (
            torch.autograd.grad((weights * x).sum(), wanted, retain_graph=True)[0] for x in (found, expected)
        )
        assert torch.allclose(ours, plain, atol=1e-9) and ours.abs().max() > 1e-3
    with clip.in_chunks(1):
        again = clip.encode_image(pixels, normalize=False), clip.embed_texts(texts)
    assert torch.allclose(again[0], embedded[0], atol=1e-9)
    assert torch.allclose(again[1], torch.nn.functional.normalize(embedded[1], dim=-1), atol=1e-9)


def test_they_begin_as_the_words_of_the_template():
    """With tokens in the first block alone, texts are those of the model."""
    base = tiny_clip(vision_cfg=VISION, text_cfg=TEXT)
    clip = WithCoupledTokens.begin(base, 4, 1, seed=0)
    texts = [clip.template.format(name) for name in ("cat", "lemon")]
    assert torch.allclose(clip.embed_texts(texts), base.embed_texts(texts), atol=1e-6)
    other = WithCoupledTokens.begin(base, 4, 1, seed=1)
    assert not torch.equal(other.learned, clip.learned) and other.learned.shape == clip.learned.shape


def test_they_survive_saving_and_a_fast_copy(tmp_path, saved_clip):
    base = load_model(saved_clip)
    clip = WithCoupledTokens.begin(base, 2, 9, seed=0)
    pixels, texts = torch.rand(3, 3, 8, 8), ["a photo of a cat", "a photo of a lemon"]
    save_checkpoint(clip, tmp_path / "prompt", {})
    again = load_model(f"prompted:{tmp_path / 'prompt'}")
    assert type(again) is WithCoupledTokens and again.fingerprint() == clip.fingerprint()
    with torch.no_grad():
        expected = clip.encode_image(pixels)
        assert torch.equal(again.encode_image(pixels), expected)
        assert torch.equal(again.embed_texts(texts), clip.embed_texts(texts))
        assert torch.allclose(fast_copy(clip).encode_image(pixels), expected, atol=1e-6)
        assert torch.allclose(fast_copy(clip, "bf16").encode_image(pixels), expected, atol=0.05)
        assert not torch.allclose(base.encode_image(pixels), expected, atol=0.01), "the base is as it was"


def test_what_they_cannot_be_is_explained():
    with pytest.raises(UserError, match="1 to 4"):
        WithCoupledTokens.begin(tiny_clip(), 5, 9, seed=0)
    resnet = tiny_clip(vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16})
    with pytest.raises(UserError, match="tokens"):
        WithCoupledTokens.begin(resnet, 2, 9, seed=0)
    with pytest.raises(UserError, match="fit"):
        WithCoupledTokens(tiny_clip(), torch.zeros(7))

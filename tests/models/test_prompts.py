"""Learned prompts: where they stand, how they are saved, and that the model under them stays what it is."""

import json

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_clip
from rayclip.methods import make_method
from rayclip.models import ZeroShot, fast_copy, load_model
from rayclip.models.attention import patch_tower
from rayclip.models.checkpoint import LINEAGE_FILE, PROMPT_FILE, restore, save_checkpoint
from rayclip.models.loading import BUNDLED
from rayclip.models.prompts import WithContext, WithFrame, WithFrameAndTokens, frame_mask
from rayclip.types import UserError


def learned(kind, base):
    """With values that matter, as if they had been learned."""
    clip = WithContext.begin(base, 5, seed=0) if kind is WithContext else WithFrame.begin(base)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        clip.learned.copy_(torch.randn(clip.learned.shape, generator=generator, dtype=torch.float64))
    return clip


def plain_text_embedding(model, vectors_LW, end):
    """open_clip's text tower, step by step, on word vectors instead of tokens."""
    x = vectors_LW + model.positional_embedding[: len(vectors_LW)]
    mask = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
        heads = block.attn.num_heads
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(0, 1) for z in (q, k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        x = x + block.mlp(block.ln_2(x))
    return F.normalize(model.ln_final(x)[end] @ model.text_projection, dim=-1)


@pytest.mark.parametrize("text", ["cat", "a rather long name of a class"])
def test_the_context_stands_between_the_start_mark_and_the_words(text):
    clip = learned(WithContext, tiny_clip(dtype=torch.float64))
    tokens = clip.tokenize([text])[0]
    end = int(tokens.argmax())
    words = clip.model.token_embedding(tokens[: end + 1])
    vectors = torch.cat([words[:1], clip.learned, words[1:]])
    expected = plain_text_embedding(clip.model, vectors, end + 5)
    found = clip.embed_texts([text, "dog"])[0]
    assert torch.allclose(found, expected, atol=1e-9)
    ours, plain = (torch.autograd.grad(x[3], clip.learned)[0] for x in (found, expected))
    assert ours.abs().min() > 0 and torch.allclose(ours, plain, atol=1e-9)


def test_a_text_without_room_is_cut_before_its_end_mark():
    clip = learned(WithContext, tiny_clip())
    words = "one two three four five six seven eight nine ten eleven twelve"  # 14 tokens, and 5 of 16 are taken
    same = clip.embed_texts([words, words.replace("eleven twelve", "thirteen"), words.replace("nine", "thirteen")])
    assert torch.allclose(same[0], same[1], atol=1e-6) and not torch.allclose(same[0], same[2], atol=1e-3)


def test_the_context_takes_half_of_a_short_tower_and_depends_on_the_seed():
    clip = tiny_clip()  # 16 positions
    assert WithContext.begin(clip, 16, 0).learned.shape == (8, 32)
    assert WithContext.begin(clip, 4, 0).learned.shape == (4, 32)
    assert not torch.equal(WithContext.begin(clip, 4, 0).learned, WithContext.begin(clip, 4, 1).learned)


def test_class_prompts_are_the_bare_names_behind_a_context():
    clip = learned(WithContext, tiny_clip())
    victim = ZeroShot(clip, ["Sea_lion", "cat"])
    assert victim.prompts == ["sea lion", "cat"] and victim.template == "{}"
    assert ZeroShot(learned(WithFrame, tiny_clip()), ["cat"]).prompts == ["This is a photo of a cat"]


@pytest.mark.parametrize("size", [8, 20])
def test_the_frame_is_added_to_the_border_of_the_towers_input(size):
    base = tiny_clip(dtype=torch.float64)
    clip = learned(WithFrame, base)
    pixels = torch.rand(2, 3, size, size, dtype=torch.float64)
    small = pixels if size == 8 else F.interpolate(pixels, size=(8, 8), mode="bicubic", antialias=True)
    x = (small - base.mean) / base.std
    values = iter(range(28))
    for row in range(8):
        for column in range(8):
            if row in (0, 7) or column in (0, 7):
                x[:, :, row, column] += clip.learned[:, next(values)].detach()
    assert next(values, None) is None, "a pixel of 8 for the 30 of 224"
    assert torch.allclose(clip.encode_image(pixels), base.model.encode_image(x, normalize=True), atol=1e-12)


def test_the_frame_is_30_pixels_of_224():
    mask = frame_mask(224)
    assert mask[:30].all() and mask[-30:].all() and mask[:, :30].all() and mask[:, -30:].all()
    assert not mask[30:-30, 30:-30].any()
    assert frame_mask(4).sum() == 12


def test_an_empty_frame_is_the_model_itself():
    base, pixels = tiny_clip(), torch.rand(2, 3, 8, 8)
    assert torch.equal(WithFrame.begin(base).encode_image(pixels), base.encode_image(pixels))


@pytest.mark.parametrize("kind", [WithContext, WithFrame])
def test_a_prompt_is_saved_apart_and_loaded_onto_its_model(kind, saved_clip, tmp_path):
    base = load_model(saved_clip)
    clip = learned(kind, base)
    save_checkpoint(clip, tmp_path / "p", {"method": "some"})
    assert {f.name for f in (tmp_path / "p").iterdir()} == {PROMPT_FILE, LINEAGE_FILE}
    assert (tmp_path / "p" / PROMPT_FILE).stat().st_size < 2000
    again = load_model(f"prompted:{tmp_path / 'p'}")
    pixels, texts = torch.rand(3, 3, 8, 8), ["a cat", "lemon"]
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), clip.encode_image(pixels))
        assert torch.equal(again.embed_texts(texts), clip.embed_texts(texts))
        different = (
            again.embed_texts(texts) - base.embed_texts(texts),
            again.encode_image(pixels) - base.encode_image(pixels),
        )
    assert [bool(d.abs().max() > 1e-3) for d in different] == [kind is WithContext, kind is WithFrame]
    assert again.fingerprint() == clip.fingerprint() != base.fingerprint() == load_model(saved_clip).fingerprint()
    other = learned(kind, load_model(saved_clip))
    with torch.no_grad():
        other.learned.zero_()
    assert other.fingerprint() != clip.fingerprint()
    restore(other, tmp_path / "p")
    assert other.fingerprint() == again.fingerprint()
    with pytest.raises(UserError, match="frozen"):
        again.parameters_of("all")
    with pytest.raises(UserError, match="already"):
        learned(kind, again)
    assert not again.train().training


def test_a_prompt_whose_model_changed_or_went_is_explained(saved_clip, tmp_path):
    spec = f"prompted:{tmp_path / 'p'}"
    save_checkpoint(learned(WithFrame, load_model(saved_clip)), tmp_path / "p", {})
    save_checkpoint(tiny_clip(seed=1), tmp_path / "tiny", {})
    with pytest.raises(UserError, match="another model"):
        load_model(spec)
    (tmp_path / "tiny").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="not there"):
        load_model(spec)


def test_damaged_and_missing_prompts_are_explained(saved_clip, tmp_path):
    with pytest.raises(UserError, match="no learned prompt"):
        load_model(f"prompted:{tmp_path}")
    with pytest.raises(UserError, match="no learned prompt"):
        load_model(f"prompted:{BUNDLED['digits']}")
    folder = tmp_path / "p"
    save_checkpoint(learned(WithFrame, load_model(saved_clip)), folder, {})
    stored = (folder / PROMPT_FILE).read_bytes()
    (folder / PROMPT_FILE).write_bytes(stored[:-20])
    with pytest.raises(UserError, match="damaged"):
        load_model(f"prompted:{folder}")
    (folder / PROMPT_FILE).write_bytes(stored)
    about = json.loads((folder / LINEAGE_FILE).read_text())
    about["prompt"]["kind"] = "context"
    (folder / LINEAGE_FILE).write_text(json.dumps(about))
    with pytest.raises(UserError, match="damaged"):
        load_model(f"prompted:{folder}")


def test_a_text_tower_of_another_kind_is_explained():
    clip = tiny_clip()
    clip._tokenizer = lambda texts: torch.zeros(len(texts), 16, dtype=torch.int64)
    with pytest.raises(UserError, match="CLIP"):
        WithContext.begin(clip, 4, 0)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(UserError, match="fit"):
        WithFrame(tiny_clip(), torch.zeros(3, 27))


def test_a_frame_starts_empty_or_from_a_normal_distribution():
    base = tiny_clip()
    assert not WithFrame.begin(base).learned.any()
    drawn = WithFrame.begin(base, 3).learned
    assert torch.equal(drawn, WithFrame.begin(base, 3).learned) and not torch.equal(
        drawn, WithFrame.begin(base, 4).learned
    )
    large = WithFrame.begin(tiny_clip(vision_cfg={**VISION, "image_size": 224, "patch_size": 32}), 0).learned
    assert abs(large.mean()) < 0.02 and abs(large.std() - 1) < 0.02 and large.numel() == 3 * (224**2 - 164**2)


VISION = {"image_size": 8, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4}


def image_embedding_with(clip, pixels_CHW, tokens):
    """open_clip's ViT taken apart, with vectors after the patches that have no position."""
    tower = clip.model.visual
    x = (pixels_CHW - clip.mean[0]) / clip.std[0]
    frame = torch.zeros_like(x)
    frame[:, frame_mask(8)] = clip.frame
    patches = tower.conv1((x + frame)[None])[0].flatten(1).T
    x = torch.cat([tower.class_embedding[None], patches]) + tower.positional_embedding
    x = tower.ln_pre(torch.cat([x, tokens]))[None]
    for block in tower.transformer.resblocks:
        x = block(x)
    return tower.ln_post(x[0, 0]) @ tower.proj


def test_tokens_stand_after_the_patches_and_are_learned():
    clip = WithFrameAndTokens.begin(tiny_clip(dtype=torch.float64), 1, 3)
    frame = 3 * int(frame_mask(8).sum())
    assert clip.learned.shape == (frame + 3 * 32,)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    expected = torch.stack([image_embedding_with(clip, x, clip.learned[frame:].view(3, 32)) for x in pixels])
    found = clip.encode_image(pixels, normalize=False)
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.allclose(
        found, WithFrame(clip_base(clip), clip.frame.detach()).encode_image(pixels, normalize=False)
    )
    for wanted in (clip.learned, pixels):
        ours, plain = (torch.autograd.grad(x.square().sum(), wanted, retain_graph=True)[0] for x in (found, expected))
        assert torch.allclose(ours, plain, atol=1e-9) and ours.abs().max() > 0
    begun = WithFrameAndTokens.begin(tiny_clip(), None, 3)
    assert not begun.frame.any() and begun.learned[frame:].std() > 0.5


def clip_base(clip):
    base = tiny_clip(dtype=torch.float64)
    base.model.load_state_dict(clip.model.state_dict())
    return base


def test_tokens_survive_saving_and_a_fast_copy(tmp_path, saved_clip):
    base = load_model(saved_clip)
    clip = WithFrameAndTokens.begin(base, 1, 2)
    pixels = torch.rand(3, 3, 8, 8)
    save_checkpoint(clip, tmp_path / "prompt", {})
    again = load_model(f"prompted:{tmp_path / 'prompt'}")
    assert type(again) is WithFrameAndTokens and again.fingerprint() == clip.fingerprint()
    with torch.no_grad():
        expected = clip.encode_image(pixels)
        assert torch.equal(again.encode_image(pixels), expected)
        assert torch.allclose(fast_copy(clip).encode_image(pixels), expected, atol=1e-6)
        assert torch.allclose(fast_copy(clip, "bf16").encode_image(pixels), expected, atol=0.05)
        assert not torch.allclose(base.encode_image(pixels), expected, atol=0.01), "the base is as it was"


def test_towers_that_take_no_tokens_are_refused():
    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    with pytest.raises(UserError, match="tokens"):
        WithFrameAndTokens.begin(tiny_clip(vision_cfg=tower), 0, 2)
    with pytest.raises(UserError, match="tokens"):
        make_method("vp", tokens=2).check(tiny_clip(vision_cfg=tower))
    with pytest.raises(UserError, match="tokens"):
        patch_tower(WithFrameAndTokens.begin(tiny_clip(), 0, 2))

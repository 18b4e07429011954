"""Text-guided attention agrees, entry by entry and in its gradient, with the tower taken apart by hand, in float64."""

import pytest
import torch

import naive
from conftest import tiny_clip
from rayclip.models import load_model
from rayclip.models.attention import encode_with_patches, patch_tower, text_guided_attention
from rayclip.types import UserError

# 8x8 pixels in patches of 2: a grid of 4x4
FINE = {"vision_cfg": {"image_size": 8, "layers": 2, "width": 32, "head_width": 16, "patch_size": 2}}


def inputs(clip, n=3, side=8):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.rand(n, 3, side, side, generator=generator, dtype=torch.float64)
    texts = clip.embed_texts([f"a {w} thing" for w in ("red", "round", "small", "old", "wet", "big")]).detach()
    return pixels, texts.view(n, 2, -1)


@pytest.mark.parametrize("changes", [{}, FINE, {"quick_gelu": True}])
def test_one_forward_gives_the_embedding_and_the_patches(changes):
    clip = tiny_clip(dtype=torch.float64, **changes)
    pixels, _ = inputs(clip)
    calls = []
    clip.model.visual.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    image, patches = encode_with_patches(clip, pixels)
    assert len(calls) == 1
    assert torch.allclose(image, clip.encode_image(pixels), atol=1e-12)
    for b in range(len(pixels)):
        for found, plain in zip(patches[b], naive.patch_embeddings(clip, pixels[b]), strict=True):
            assert torch.allclose(found, naive.unit(plain), atol=1e-12)


@pytest.mark.parametrize("changes", [{}, FINE])
def test_attention_and_its_gradient_agree_with_the_plain_loop(changes):
    clip = tiny_clip(dtype=torch.float64, **changes)
    pixels, texts = inputs(clip)
    weights = torch.rand(3, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    _, patches = encode_with_patches(clip, pixels.requires_grad_())
    ours = text_guided_attention(clip, patches, texts)
    plain = torch.stack([naive.attention(naive.patch_embeddings(clip, pixels[b]), list(texts[b]), 8) for b in range(3)])
    assert ours.shape == (3, 64) and torch.allclose(ours, plain, atol=1e-12)
    assert ours.detach().min() >= 0 and ours.detach().max() <= 1
    wanted = [pixels, *clip.parameters_of("image")]
    gradients = [torch.autograd.grad((weights * a).sum(), wanted) for a in (ours, plain)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10) and b.abs().max() > 0


def test_maps_are_averaged_before_they_are_scaled():
    """Two texts, one with a steep map and one with a flat one: the flat one must not weigh as much as the steep one."""
    clip = tiny_clip(dtype=torch.float64)
    texts = torch.eye(16, dtype=torch.float64)[:2]
    patches = torch.zeros(1, 4, 16, dtype=torch.float64)
    patches[0, :, 0] = torch.tensor([0.0, 0.8, 0.4, 0.2])
    patches[0, :, 1] = torch.tensor([0.02, 0.0, 0.01, 0.02])
    grid = text_guided_attention(clip, patches, texts[None]).view(8, 8)
    corners = [grid[0, 0], grid[0, 7], grid[7, 0], grid[7, 7]]
    means = [0.01, 0.4, 0.205, 0.11]  # by hand
    wanted = [(m - 0.01) / 0.39 for m in means]
    assert [c.item() for c in corners] == pytest.approx(wanted, abs=1e-8)


def test_images_of_another_size_are_resized_first():
    clip = tiny_clip(dtype=torch.float64)
    pixels, texts = inputs(clip, side=12)
    image, patches = encode_with_patches(clip, pixels)
    assert torch.allclose(image, clip.encode_image(pixels), atol=1e-12)
    assert text_guided_attention(clip, patches, texts).shape == (3, 64)


def test_a_flat_map_has_finite_gradients():
    clip = tiny_clip()
    patches = torch.ones(2, 4, 16).div(4).requires_grad_()
    attention = text_guided_attention(clip, patches, torch.ones(2, 1, 16) / 4)
    attention.sum().backward()
    assert torch.equal(attention, torch.zeros(2, 64)) and patches.grad.isfinite().all()


def test_scores_are_not_rounded_under_autocast():
    clip = tiny_clip()
    patches, texts = (torch.nn.functional.normalize(torch.randn(2, n, 16), dim=-1) for n in (4, 1))
    exact = text_guided_attention(clip, patches, texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text_guided_attention(clip, patches, texts), exact)


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
POOLED = {**FINE["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}
DROPPED = {**FINE["vision_cfg"], "patch_dropout": 0.5}


@pytest.mark.parametrize("tower", [RESNET, POOLED, DROPPED])
def test_towers_without_patches_in_the_space_of_embeddings_are_refused(tower):
    with pytest.raises(UserError, match="tiny"):
        patch_tower(tiny_clip(vision_cfg=tower))


def test_the_bundled_model_has_patches():
    clip = load_model("digits")
    pixels = torch.rand(2, 3, 8, 8)
    image, patches = encode_with_patches(clip, pixels)
    assert patches.shape == (2, 16, 64) and torch.allclose(image, clip.encode_image(pixels), atol=1e-5)

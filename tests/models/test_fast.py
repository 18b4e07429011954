"""Copies of a model for attacks, in other precision or compiled: the same function up to rounding, no trace on it."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from conftest import tiny_clip
from rayclip.models import fast_copy
from rayclip.models.fast import padded, refresh

PIXELS = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROUNDING = {"fp32": 1e-6, "bf16": 0.05, "fp16": 0.005}


def embedding_and_gradient(clip, weight=1.0):
    pixels = PIXELS.clone().requires_grad_()
    embedded = clip.encode_image(pixels)
    (gradient,) = torch.autograd.grad((weight * embedded[:, 0]).sum(), pixels)
    return embedded.detach(), gradient


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_a_copy_is_the_model_up_to_rounding(precision, compiled):
    """Compiled without code generation: what is tested is the padding and the way through dynamo and autograd."""
    clip = tiny_clip()
    before = clip.fingerprint()
    fast = fast_copy(clip, precision, compiled=compiled, backend="aot_eager")
    (expected, slope), (found, fast_slope) = embedding_and_gradient(clip), embedding_and_gradient(fast)
    assert found.dtype == fast_slope.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() < ROUNDING[precision]
    assert F.cosine_similarity(slope.flatten(1), fast_slope.flatten(1)).min() > 1 - ROUNDING[precision]
    assert torch.allclose(
        slope.flatten(1).norm(dim=1), fast_slope.flatten(1).norm(dim=1), rtol=10 * ROUNDING[precision]
    )
    assert clip.fingerprint() == before and all(p.requires_grad for p in clip.model.parameters())
    with torch.no_grad():
        assert torch.equal(fast.embed_texts(["a cat"]), clip.embed_texts(["a cat"]))


def test_the_precision_is_what_was_asked_for():
    """Rounding of bf16 is seen in the embedding, and the tower's own matrix products are in bf16."""
    clip, seen = tiny_clip(), []
    fast = fast_copy(clip, "bf16")
    fast.model.visual.visual.transformer.resblocks[0].mlp.register_forward_hook(
        lambda _, inputs, out: seen.append(out.dtype)
    )
    with torch.no_grad():
        assert (fast.encode_image(PIXELS) - clip.encode_image(PIXELS)).abs().max() > 1e-4
    assert seen == [torch.bfloat16]


def test_small_gradients_survive_half_precision():
    """Of an image that is far from broken the loss has a slope of 1e-9, which fp16 has no number for."""
    clip = tiny_clip()
    _, gradient = embedding_and_gradient(fast_copy(clip, "fp16"), weight=1e-9)
    _, expected = embedding_and_gradient(clip, weight=1e-9)
    assert F.cosine_similarity(gradient.flatten(1) * 1e9, expected.flatten(1) * 1e9).min() > 0.99


def test_few_batch_sizes_reach_a_compiled_tower():
    sizes = {padded(count) for count in range(1, 257)}
    assert all(count <= padded(count) <= max(1.25 * count + 1, count + 7) for count in range(1, 257))
    assert len(sizes) <= 20


@pytest.mark.ci
def test_a_compiled_tower_is_compiled_for_its_first_batch_size_and_once_for_all_others():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = fast_copy(tiny_clip(), compiled=True, backend=counter)
    clip = tiny_clip()
    for count in (40, 33, 17, 9, 5, 1):
        pixels = PIXELS.repeat(8, 1, 1, 1)[:count]
        with torch.no_grad():
            assert torch.allclose(fast.encode_image(pixels), clip.encode_image(pixels), atol=1e-6)
    assert counter.frame_count == 2


def test_every_tower_is_compiled_however_many_there_are():
    """torch counts compilations by code object, and stops at its limit without an error."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for seed in range(3):
            fast_copy(tiny_clip(seed), compiled=True, backend=counter).encode_image(PIXELS)
    assert counter.frame_count == 3


def test_a_tower_that_cannot_be_compiled_runs_without():
    def broken(graph, inputs):
        raise AssertionError("in the compiler")

    torch._dynamo.reset()
    clip = tiny_clip()
    fast = fast_copy(clip, compiled=True, backend=broken)
    with pytest.warns(UserWarning, match="without compiling"):
        found, slope = embedding_and_gradient(fast)
    expected, own_slope = embedding_and_gradient(clip)
    assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(slope, own_slope, atol=1e-6)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_refreshed_copy_is_the_model_of_now(quick_gelu):
    clip = tiny_clip(quick_gelu=quick_gelu)
    fast = fast_copy(clip, "fp16")
    assert any(isinstance(m, torch.nn.SiLU) for m in fast.model.visual.modules()) == quick_gelu
    with torch.no_grad():
        assert (fast.encode_image(PIXELS) - clip.encode_image(PIXELS)).abs().max() < 0.005
        clip.load_state_dict(tiny_clip(1, quick_gelu=quick_gelu).state_dict())
        assert (fast.encode_image(PIXELS) - clip.encode_image(PIXELS)).abs().max() > 0.05
        refresh(fast)
        assert (fast.encode_image(PIXELS) - clip.encode_image(PIXELS)).abs().max() < 0.005


def test_autocast_does_not_touch_a_copy():
    """It would run in bf16 what is in fp16, and some of it in fp32."""
    fast = fast_copy(tiny_clip(), "fp16")
    expected, _ = embedding_and_gradient(fast)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fast.encode_image(PIXELS), expected)

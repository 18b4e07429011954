"""How images reach the model's input size: one loaded model, resized either way."""

import pytest
import torch
from torch.nn import functional as F

from conftest import tiny_clip
from rayclip.attacks import Samples, make_attack
from rayclip.defenses.ttc import TTC, instability
from rayclip.models import ZeroShot, fast_copy
from rayclip.models.attention import encode_with_patches
from rayclip.models.checkpoint import save_checkpoint
from rayclip.models.prompts import WithContext, WithFrame
from rayclip.models.resizing import resized, resized_by_products
from rayclip.models.scorers import CuPL, random_crops
from rayclip.rng import sample_keys

NOISE = torch.Generator().manual_seed(0)
SMALL, LARGE = (torch.rand(2, 3, side, side, generator=NOISE) for side in (5, 20))


def by_hand(clip, pixels):
    """The reference code's way, for an 8 px model."""
    return clip.model.encode_image((F.interpolate(pixels, (8, 8), mode="bicubic") - clip.mean) / clip.std, True)


@pytest.mark.parametrize("pixels", [SMALL, LARGE], ids=["smaller", "larger"])
def test_a_view_resizes_plainly_and_leaves_the_loaded_model_alone(clip, pixels):
    plain = clip.with_resize("plain")
    assert plain.model is clip.model and clip.with_resize("antialias") is clip
    with torch.no_grad():
        assert torch.allclose(plain.encode_image(pixels), by_hand(clip, pixels), atol=1e-6)
        assert not torch.allclose(clip.encode_image(pixels), by_hand(clip, pixels), atol=1e-3)
        assert torch.equal(plain.with_resize("antialias").encode_image(pixels), clip.encode_image(pixels))
    assert plain.fingerprint() == clip.fingerprint(), "it is the same model"


def test_images_of_the_models_size_are_not_touched(clip):
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(clip.with_resize("plain").encode_image(pixels), clip.encode_image(pixels))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fast_copy_resizes_as_its_model_does(clip, precision):
    near = {"fp32": 1e-6, "bf16": 0.05}[precision]
    with torch.no_grad():
        for view in (clip.with_resize("plain"), clip):
            fast = fast_copy(view, precision)
            assert torch.allclose(fast.encode_image(SMALL), view.encode_image(SMALL), atol=near)
        back = fast_copy(clip, precision).with_resize("plain")
        assert torch.allclose(back.encode_image(SMALL), by_hand(clip, SMALL), atol=near)


@pytest.mark.parametrize("learned", [lambda c: WithFrame.begin(c), lambda c: WithContext.begin(c, 2, 0)])
def test_a_learned_prompt_keeps_the_resize_of_its_model(clip, learned):
    with torch.no_grad():
        for prompted in (learned(clip.with_resize("plain")), learned(clip).with_resize("plain")):
            assert torch.allclose(prompted.encode_image(SMALL), by_hand(clip, SMALL), atol=1e-6)


def test_attention_maps_see_the_resized_image(clip):
    with torch.no_grad():
        image_BD, _ = encode_with_patches(clip.with_resize("plain"), SMALL)
        assert torch.allclose(image_BD, by_hand(clip, SMALL), atol=1e-6)


def test_crops_of_large_images_are_taken_from_the_resized_one(clip):
    keys = sample_keys(range(2))
    small = F.interpolate(LARGE, (8, 8), mode="bicubic")
    assert torch.equal(random_crops(LARGE, keys, 3, 0.5, 8, "plain"), random_crops(small, keys, 3, 0.5, 8))
    assert not torch.allclose(random_crops(LARGE, keys, 3, 0.5, 8), random_crops(small, keys, 3, 0.5, 8), atol=1e-3)


def test_a_defences_original_and_a_transfers_source_resize_as_the_victim(clip, tmp_path, monkeypatch):
    save_checkpoint(tiny_clip(seed=3), tmp_path / "other", {})
    spec, other = f"local-dir:{tmp_path / 'other'}", tiny_clip(seed=3)
    victim = ZeroShot(clip.with_resize("plain"), ["cat", "dog"])
    keys = sample_keys(range(2))
    seen = []
    monkeypatch.setattr("rayclip.defenses.ttc.instability", lambda a, b: seen.append((a, b)) or instability(a, b))
    TTC(original=spec).purify(victim, SMALL, keys)
    with torch.no_grad():
        assert torch.allclose(seen[0][0], other.with_resize("plain").encode_image(SMALL, normalize=False), atol=1e-5)
    samples = Samples(SMALL, torch.tensor([0, 1]), keys)
    settings = {"steps": 3, "step": 8 / 255}
    attack = make_attack("transfer", source=spec, **settings)
    expected = make_attack("pgd", stop="final", **settings)
    for resize in ("plain", "antialias", "plain"):  # the cached source serves both
        moved = attack.run(victim.with_clip(clip.with_resize(resize)), samples, eps=8 / 255)
        source = ZeroShot(other.with_resize(resize), ["cat", "dog"])
        assert torch.equal(moved.images_BCHW, expected.run(source, samples, eps=8 / 255).images_BCHW)


def test_a_classifier_with_captions_resizes_as_its_model(clip):
    scorer = CuPL().with_texts([["a cat", "one cat"], ["a dog"]])
    plain, default = (scorer.classifier(c, ["cat", "dog"], "a {}") for c in (clip.with_resize("plain"), clip))
    with torch.no_grad():
        assert torch.allclose(plain.embed(SMALL), by_hand(clip, SMALL), atol=1e-6)
        assert not torch.allclose(default.embed(SMALL), by_hand(clip, SMALL), atol=1e-3)


@pytest.mark.parametrize("how", ["antialias", "plain"])
@pytest.mark.parametrize("shape", [(5, 5), (20, 20), (20, 5), (8, 13)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_two_matrix_products_resize_as_the_kernel(how, shape):
    """What a GPU does; under autocast in fp32, too."""
    pixels = torch.rand(2, 3, *shape, generator=NOISE).requires_grad_()
    weights = torch.rand(2, 3, 8, 8, generator=NOISE)
    found = []
    for function in (resized, resized_by_products):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(pixels, 8, how)
        found.append((out.detach(), *torch.autograd.grad((weights * out).sum(), pixels)))
    assert all(torch.allclose(a, b, atol=3e-6) for a, b in zip(*found, strict=True))

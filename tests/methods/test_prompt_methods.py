"""AdvPT and VP: loss, gradient and attack agree with their formulas in float64, and the model stays as it was."""

from dataclasses import replace

import pytest
import torch

import naive
from conftest import tiny_clip
from methods.test_losses import attacked, example, method
from rayclip.methods import make_method
from rayclip.models.clip import frozen
from rayclip.models.prompts import WithContext, WithFrame
from rayclip.types import UserError


def dressed(name):
    """The method, a model with a prompt that is not at its beginning, and a batch."""
    chosen = method(name, **({"context": 5} if name == "advpt" else {}))
    clip = chosen.wrap_model(tiny_clip(dtype=torch.float64), seed=0)
    clip.requires_grad_(False)
    clip.learned.requires_grad_(True)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        clip.learned.add_(torch.randn(clip.learned.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return chosen, clip, example(clip)


def plain_loss(clip, images, texts, labels):
    """Mean cross-entropy of un-normalised vectors, term by term, differentiable."""
    total = 0.0
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = torch.stack([clip.scale * naive.unit(image) @ naive.unit(text) for text in texts])
        total = total + torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return total / len(labels)


def agrees(clip, loss, plain):
    assert isinstance(clip, WithContext | WithFrame)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-9)
    ours, theirs = (torch.autograd.grad(x, clip.learned)[0] for x in (loss, plain))
    assert ours.abs().max() > 1e-3 and torch.allclose(ours, theirs, atol=1e-9)


def test_advpt_is_the_cross_entropy_of_embeddings_made_before():
    chosen, clip, batch = dressed("advpt")
    with frozen(clip):
        prepared = chosen.prepare(clip, batch)
    made = []
    for x, key in zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True):
        clean = clip.encode_image(x[None], normalize=False)[0].detach()

        def distance(z, done, clean=clean):
            other = clip.encode_image(z[None], normalize=False)[0]
            p = torch.tensor(naive.softmax(clean), dtype=torch.float64)
            return (p * (p.log() - (other - other.logsumexp(0)))).sum()

        y = naive.ascend(distance, x, key=key, eps=8 / 255, step=4 / 255, steps=3)
        made.append(clip.encode_image(y[None], normalize=False)[0].detach())
    assert torch.allclose(prepared, torch.stack([naive.unit(z) for z in made]), atol=1e-9)
    batch = attacked(clip, chosen, replace(batch, prepared_BD=prepared))
    assert batch.adversarial_BCHW is None, "there is no attack while the context is learned"
    texts = clip.encode_text(clip.tokenize(batch.texts.prompts), normalize=False)
    agrees(clip, chosen.loss(clip, batch)[0], plain_loss(clip, made, texts, batch.labels_B))


def test_vp_is_the_cross_entropy_of_images_attacked_through_the_frame():
    chosen, clip, batch = dressed("vp")
    batch = attacked(clip, chosen, batch)
    texts = clip.encode_text(clip.tokenize(batch.texts.prompts), normalize=False).detach()
    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        label = batch.labels_B[i : i + 1]

        def loss(z, done, label=label):
            return plain_loss(clip, clip.encode_image(z[None], normalize=False), texts, label)

        expected = naive.ascend(loss, x, key=key, eps=8 / 255, step=4 / 255, steps=3)
        assert torch.allclose(batch.adversarial_BCHW[i], expected, atol=1e-9)
    images = clip.encode_image(batch.adversarial_BCHW, normalize=False)
    agrees(clip, chosen.loss(clip, batch)[0], plain_loss(clip, images, texts, batch.labels_B))


@pytest.mark.parametrize("name", ["advpt", "vp"])
def test_what_prompt_methods_cannot_do_is_explained(name):
    clip = tiny_clip()
    chosen = make_method(name)
    chosen.check(clip)
    with pytest.raises(UserError, match=f"{name}.*trains"):
        replace(chosen, trains="image").check(clip)
    with pytest.raises(UserError, match="already"):
        chosen.check(chosen.wrap_model(clip, 0))


def test_what_advpt_cannot_do_is_explained():
    clip = tiny_clip()
    with pytest.raises(UserError, match="random"):
        make_method("advpt", start="zero").check(clip)
    clip._tokenizer = None
    with pytest.raises(UserError, match="CLIP"):
        make_method("advpt").check(clip)
    make_method("vp").check(clip)

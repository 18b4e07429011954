"""Methods that learn prompts: loss, gradient and attack agree with their formulas in float64."""

from dataclasses import replace

import pytest
import torch

import naive
from conftest import tiny_clip
from methods.test_losses import attacked, example, method
from rayclip.methods import make_method
from rayclip.models import Clip
from rayclip.models.clip import frozen
from rayclip.models.prompts import Prompted
from rayclip.types import UserError


def dressed(name, **settings):
    """The method, a model with a prompt that is not at its beginning, and a batch."""
    chosen = method(name, **({"context": 5} if name == "advpt" else {}), **settings)
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
    assert isinstance(clip, Prompted)
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


@pytest.mark.parametrize(
    ("name", "settings"), [("vp", {}), ("apt", {}), ("apt", {"prompting": "constant"})], ids=["vp", "apt", "constant"]
)
def test_the_loss_is_the_cross_entropy_of_images_attacked_through_the_prompt(name, settings):
    """Or in APT, if told so, through a written one."""
    chosen, clip, batch = dressed(name, **settings)
    batch = attacked(clip, chosen, batch)
    texts = clip.encode_text(clip.tokenize(batch.texts.prompts), normalize=False)
    seen = texts.detach()
    if settings:
        written = [f"a photo of a {prompt}" for prompt in batch.texts.prompts]
        seen = Clip.encode_text(clip, clip.tokenize(written), normalize=False).detach()
    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        label = batch.labels_B[i : i + 1]

        def loss(z, done, label=label):
            return plain_loss(clip, clip.encode_image(z[None], normalize=False), seen, label)

        expected = naive.ascend(loss, x, key=key, eps=8 / 255, step=4 / 255, steps=3)
        assert torch.allclose(batch.adversarial_BCHW[i], expected, atol=1e-9)
    images = clip.encode_image(batch.adversarial_BCHW, normalize=False)
    agrees(clip, chosen.loss(clip, batch)[0], plain_loss(clip, images, texts, batch.labels_B))


def test_apts_perturbed_context_climbs_with_the_images():
    """In the same steps, by the mean over the batch; the loss is that of the context before."""
    chosen, clip, batch = dressed("apt", prompting="perturbed", context_step=30.0)
    before, rows = clip.learned.detach().clone(), clip.tokenize(batch.texts.prompts)

    def loss(z):
        texts = clip.encode_text(rows, normalize=False)
        value = plain_loss(clip, clip.encode_image(z, normalize=False), texts, batch.labels_B)
        climbed.append(clip.learned + 30 * torch.autograd.grad(value, clip.learned, retain_graph=True)[0])
        return value

    def stepwise(z):
        with torch.no_grad():
            clip.learned.copy_(climbed[-1])
        return loss(z)

    climbed = [before]
    keys = batch.keys_B.tolist()
    expected = naive.ascend_together(stepwise, batch.pixels_BCHW, keys=keys, eps=8 / 255, step=4 / 255, steps=3)
    assert (climbed[-1] - before).abs().max() > 0.01
    with torch.no_grad():
        clip.learned.copy_(before)
    made = attacked(clip, chosen, batch)
    assert torch.allclose(made.adversarial_BCHW, expected, atol=1e-9) and torch.equal(clip.learned, before)
    plain = attacked(clip, replace(chosen, prompting="on-the-fly"), batch)
    assert not torch.allclose(plain.adversarial_BCHW, expected, atol=1e-3)
    texts, images = (clip.encode_text(rows), clip.encode_image(made.adversarial_BCHW))
    agrees(clip, chosen.loss(clip, made)[0], plain_loss(clip, images, texts, batch.labels_B))


@pytest.mark.parametrize("aware", [True, False])
def test_fap_is_the_clean_loss_and_the_divergence_of_images_that_it_moved(aware):
    chosen, clip, batch = dressed("fap", weight=0.7, aware=aware)
    batch = attacked(clip, chosen, batch)

    def scores(pixels):
        texts = clip.encode_text(clip.tokenize(batch.texts.prompts), normalize=False)
        image = naive.unit(clip.encode_image(pixels[None], normalize=False)[0])
        return image, torch.stack([clip.scale * image @ naive.unit(text) for text in texts])

    def divergence(p, q):
        return sum(p.softmax(0)[k] * (p.log_softmax(0)[k] - q.log_softmax(0)[k]) for k in range(len(p)))

    plain = 0.0
    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        clean = scores(x)[1].detach()
        expected = naive.ascend(
            lambda z, done, clean=clean: divergence(clean, scores(z)[1]), x, key=key, eps=8 / 255, step=4 / 255, steps=3
        )
        assert torch.allclose(batch.adversarial_BCHW[i], expected, atol=1e-9)
        (image, natural), (moved, attacked_) = scores(x), scores(batch.adversarial_BCHW[i])
        factor = image @ moved + 1 if aware else 1
        own = -natural.log_softmax(0)[batch.labels_B[i]] + 0.7 * factor * divergence(natural, attacked_)
        plain = plain + own / len(batch.labels_B)
    agrees(clip, chosen.loss(clip, batch)[0], plain)


@pytest.mark.parametrize("name", ["advpt", "apt", "fap", "vp"])
def test_what_prompt_methods_cannot_do_is_explained(name):
    clip = tiny_clip()
    chosen = make_method(name)
    chosen.check(clip)
    with pytest.raises(UserError, match=f"{name}.*trains"):
        replace(chosen, trains="image").check(clip)
    with pytest.raises(UserError, match="already"):
        chosen.check(chosen.wrap_model(clip, 0))


def test_what_they_need_is_explained():
    clip = tiny_clip()
    for name in ("advpt", "fap"):
        with pytest.raises(UserError, match=f"{name}.*random"):
            make_method(name, start="zero").check(clip)
    clip._tokenizer = None
    for name in ("advpt", "apt", "fap"):
        with pytest.raises(UserError, match="CLIP"):
            make_method(name).check(clip)
    make_method("vp").check(clip)

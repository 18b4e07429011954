"""Co-Attack and SGA against their formulas, image by image and text by text in float64: for classes and for pairs."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import naive
from attacks.test_gradient import CLASSES, balanced, batch
from conftest import text_rows, tiny_clip
from rayclip.attacks import Samples, make_attack
from rayclip.attacks.co_attack import co_attack_loss
from rayclip.attacks.pairs import PairAttack, PairVictim, check_for_pairs
from rayclip.attacks.sga import image_loss
from rayclip.attacks.substitutes import STOP_WORDS, TokenTable
from rayclip.models import ZeroShot
from rayclip.rng import sample_keys
from rayclip.types import UserError

EPS, STEP, K = 8 / 255, 3 / 255, 5
CAPTIONS = [
    ["a dog runs on the beach .", "brown dog near water"],
    ["two men play violin"],
    ["a truck , parked by a house", "an old truck", "the red truck in a street"],
    ["lemons on a table ."],
]


def encoder(clip):
    return lambda pixels: clip.encode_image(pixels, normalize=False)


def embedder(clip):
    return lambda text: clip.embed_texts([text])[0].detach()


def substitutes(clip):
    source = TokenTable(clip, K)
    return lambda words, i: source.candidates([words])[0][i]


def settings(name, **more):
    return {"steps": 3, "step": STEP, "substitutes": "clip-table", "k": K, "stop": "final"} | more


def plain_texts(clip, texts, guide=None):
    embed = embedder(clip)
    return [naive.bert_attack(embed, t, substitutes(clip), STOP_WORDS, 1, guide) for t in texts]


def plain_co_attack(clip, x, texts, key, steps):
    """`texts` are the adversarial ones."""
    encode = encoder(clip)
    clean, embedded = encode(x[None])[0].detach(), [embedder(clip)(t) for t in texts]
    return naive.ascend(
        lambda z, _: naive.co_attack_loss(encode(z[None])[0], clean, embedded),
        x,
        key=key,
        eps=EPS,
        step=STEP,
        steps=steps,
    )


def plain_sga(clip, x, texts, key, steps, scales=(0.5, 0.75, 1.0, 1.25, 1.5), deviation=0.05):
    """The adversarial image and the adversarial texts of the clean `texts`."""
    encode, embed = encoder(clip), embedder(clip)
    first = plain_texts(clip, texts, naive.unit(encode(x[None])[0].detach()))
    embedded = [embed(t) for t in first]
    noises = 2 * sum(scale != 1 for scale in scales)

    def loss(z, done):
        return naive.sga_loss(encode, z, embedded, scales, deviation, key, 4 + done * noises)

    image = naive.ascend(loss, x, key=key, eps=EPS, step=STEP, steps=steps)
    return image, plain_texts(clip, texts, naive.unit(encode(image[None])[0].detach()))


@pytest.mark.parametrize("texts", [1, 3])
def test_co_attacks_loss_is_the_formula(texts):
    generator = torch.Generator().manual_seed(0)
    raw, clean = (2 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    text = F.normalize(torch.randn(5, texts, 7, generator=generator, dtype=torch.float64), dim=-1)
    mean = text.softmax(-1).mean(1)
    ours, plain = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    losses = co_attack_loss(F.normalize(ours, dim=-1), F.normalize(clean, dim=-1), mean, 3.0)
    expected = torch.stack([naive.co_attack_loss(plain[i], clean[i], list(text[i])) for i in range(5)])
    if texts == 1:
        assert torch.allclose(losses, expected, atol=1e-12)
    found, wanted = (torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in ((losses, ours), (expected, plain)))
    assert torch.allclose(found, wanted, atol=1e-12), "of several texts the mean has the same gradient"


@pytest.mark.parametrize("length", [0.1, 10.0])
def test_co_attack_does_not_see_how_long_embeddings_are(length):
    """A tower whose embeddings are all of another length is the same CLIP: pixel by pixel the same images."""
    found = []
    for factor in (1.0, length):
        clip = tiny_clip(dtype=torch.float64)
        with torch.no_grad():
            clip.model.visual.proj.mul_(factor)
        victim = ZeroShot(clip, CLASSES)
        images, labels, _, keys = batch(victim, 4, 10)
        attack = make_attack("co-attack", **settings("co-attack"))
        found.append(attack.run(victim, Samples(images, labels, keys), eps=EPS, prompts=attack.prepare(victim)))
    assert torch.equal(found[0].images_BCHW, found[1].images_BCHW)


def test_sgas_loss_is_the_formula():
    views, texts = torch.randn(4, 2, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    ours = image_loss(views, texts.mean(1))
    for i in range(2):
        plain = -sum(float(views[s, i] @ texts[i, t]) / 3 for s, t in itertools.product(range(4), range(3)))
        assert ours[i].item() == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_co_attack_on_classes(steps):
    victim = ZeroShot(tiny_clip(dtype=torch.float64), CLASSES)
    images, labels, _, keys = batch(victim, 3, 10)
    labels = torch.tensor([4, 0, 2])
    attack = make_attack("co-attack", **settings("co-attack", steps=steps))
    prompts = attack.prepare(victim)
    assert list(prompts) == plain_texts(victim.clip, victim.prompts)
    result = attack.run(victim, Samples(images, labels, keys), eps=EPS, prompts=prompts)
    for i, label in enumerate(labels.tolist()):
        plain = plain_co_attack(victim.clip, images[i], [prompts[label]], int(keys[i]), steps)
        assert (result.images_BCHW[i] - plain).abs().max() < 1e-9
    assert torch.allclose(result.text_KD, victim.clip.embed_texts(prompts))
    with torch.no_grad():
        assert torch.equal(
            result.logits(victim, labels), victim.logits(victim.embed(result.images_BCHW), result.text_KD)
        )


@pytest.mark.parametrize("steps", [1, 2])
def test_sga_on_classes(steps):
    victim = ZeroShot(tiny_clip(dtype=torch.float64), CLASSES)
    images, _, _, keys = batch(victim, 3, 10)
    labels = torch.tensor([4, 0, 2])
    attack = make_attack("sga", **settings("sga", steps=steps))
    result = attack.run(victim, Samples(images, labels, keys), eps=EPS)
    clip = victim.clip
    logits = result.logits(victim, labels)
    for i, label in enumerate(labels.tolist()):
        plain, texts = plain_sga(clip, images[i], [victim.prompts[label]], int(keys[i]), steps)
        assert (result.images_BCHW[i] - plain).abs().max() < 1e-9
        assert list(result.own_texts[i]) == texts
        # judged against that text and the other classes' clean ones
        prompts = [texts[0] if c == label else p for c, p in enumerate(victim.prompts)]
        against = [embedder(clip)(p) for p in prompts]
        expected = naive.scores(encoder(clip)(plain[None])[0].detach(), against, clip.scale.item())
        assert logits[i].tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", ["pgd", "sep", "co-attack", "sga"])
def test_pairs_are_the_formulas(name):
    clip = tiny_clip(dtype=torch.float64)
    victim = PairVictim(clip, CAPTIONS)
    images = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(1)).double()
    keys = sample_keys(range(4), 0, "pairs")
    attack = make_attack(
        name, **{k: v for k, v in settings(name, steps=2).items() if name != "pgd" or k in ("steps", "step", "stop")}
    )
    prompts = attack.prepare(victim)
    bound = PairAttack(attack=attack, victim=victim, keys_I=keys, prompts=prompts, eps=EPS)
    found, captions = bound(images, 0)
    flat = [c for own in CAPTIONS for c in own]
    owner = [i for i, own in enumerate(CAPTIONS) for _ in own]
    clean = [embedder(clip)(c) for c in flat]

    def over_all_images(i):
        """Cross-entropy of an image over all images, each by its mean similarity to their captions."""

        def loss(z, _):
            f = naive.unit(encoder(clip)(z[None])[0])
            logits = [
                sum(clip.scale * (f * t).sum() for t, o in zip(clean, owner, strict=True) if o == j) / len(own)
                for j, own in enumerate(CAPTIONS)
            ]
            return torch.logsumexp(torch.stack(logits), 0) - logits[i]

        return loss

    for i, own in enumerate(CAPTIONS):
        texts = own
        if name in ("sep", "co-attack"):
            texts = plain_texts(clip, own)
        if name == "sga":
            image, texts = plain_sga(clip, images[i], own, int(keys[i]), 2)
        elif name == "co-attack":
            image = plain_co_attack(clip, images[i], texts, int(keys[i]), 2)
        else:
            image = naive.ascend(over_all_images(i), images[i], key=int(keys[i]), eps=EPS, step=STEP, steps=2)
        assert (found[i] - image).abs().max() < 1e-9
        assert list(captions[i]) == texts
    later, later_captions = bound(images[2:], 2)
    assert torch.allclose(later, found[2:], atol=1e-12) and later_captions == captions[2:]


@pytest.mark.parametrize("name", ["co-attack", "sga"])
def test_stopping_at_the_first_success_counts_what_is_judged(name):
    """Images that left early are wrong against the final texts; those that hold out used every step."""
    victim = balanced()
    images, labels, todo, keys = batch(victim)
    attack = make_attack(name, **settings(name, steps=6, stop="first_success"))
    result = attack.run(victim, Samples(images, labels, keys, todo), eps=4 / 255, prompts=attack.prepare(victim))
    with torch.no_grad():
        wrong = result.logits(victim, labels).argmax(1) != labels
    assert wrong[result.steps_B < 6].all() and (result.steps_B < 6).any()
    assert (result.steps_B[~wrong] == 6).all()


def test_equal_texts_are_ranked_once():
    """A batch of 200 images of five classes costs the text forwards of five prompts."""
    victim = ZeroShot(tiny_clip(), CLASSES)
    labels = torch.arange(200) % 5
    attack = make_attack("sga", **settings("sga", steps=1))
    with text_rows(victim.clip) as seen:
        attack.run(victim, Samples(torch.rand(200, 3, 8, 8), labels, sample_keys(range(200))), eps=0.0)
    assert sum(rows for rows, _ in seen) < 5 * (1 + 2 + 2 * K)


def test_a_pair_victim_is_a_classifier_over_images():
    clip = tiny_clip(dtype=torch.float64)
    victim = PairVictim(clip, CAPTIONS)
    pixels = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = [
            [float(clip.scale * (clip.encode_image(pixels[[i]]) @ clip.embed_texts(own).T).mean()) for own in CAPTIONS]
            for i in range(3)
        ]
        assert torch.allclose(victim(pixels), torch.tensor(expected, dtype=torch.float64))
    assert [victim.prompts_of(i) for i in range(4)] == CAPTIONS


def test_what_makes_no_sense_on_pairs_is_explained():
    class ForClasses(type(make_attack("pgd"))):
        name, for_pairs = "for-classes", False

    with pytest.raises(UserError, match="for-classes"):
        check_for_pairs(ForClasses(stop="final"))
    with pytest.raises(UserError, match="stop=final"):
        check_for_pairs(make_attack("pgd"))

"""The methods that look at the original model agree with their formulas, sample by sample in float64, and so do their
gradients in every parameter."""

import pytest
import torch

import naive
from conftest import tiny_clip
from methods.test_losses import CLASSES, attacked, example, method
from rayclip.methods import make_method
from rayclip.types import UserError


def cross_entropy(logits, label):
    return logits.exp().sum().log() - logits[label]


def kl(from_logits, to_logits):
    p, q = (z.exp() / z.exp().sum() for z in (from_logits, to_logits))
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def feature(clip, image):
    return clip.encode_image(image[None], normalize=False)[0]


def text(clip, prompt):
    return clip.encode_text(clip.tokenize([prompt]), normalize=False)[0]


def logits(clip, image, prompts):
    f = naive.unit(feature(clip, image))
    return torch.stack([clip.scale * (f * naive.unit(text(clip, p))).sum() for p in prompts])


def attention(clip, image, *prompts):
    return naive.attention(naive.patch_embeddings(clip, image), [text(clip, p) for p in prompts], 8)


def distance(a, b):
    return (a - b).pow(2).sum().sqrt()


def pmg_aft(clip, original, x, adversarial, y, prompts):
    z, z_clean = logits(clip, adversarial, prompts), logits(clip, x, prompts)
    z_original = logits(original, adversarial, prompts)
    return cross_entropy(z, y) + kl(z_original, z) + kl(z_clean, z)


def fare(clip, original, x, adversarial, y, prompts):
    return (feature(clip, adversarial) - feature(original, x)).pow(2).sum()


def tga_zsr(clip, original, x, adversarial, y, prompts):
    a0 = attention(original, x, prompts[y])
    return (
        cross_entropy(logits(clip, adversarial, prompts), y)
        + 0.08 * distance(attention(clip, adversarial, prompts[y]), a0)
        + 0.05 * distance(attention(clip, x, prompts[y]), a0)
    )


def comp_tga(clip, original, x, adversarial, y, prompts):
    """The prompts are the classes', then their complements'."""
    other = prompts[len(CLASSES) + y]
    assert other == f"This is not a photo of a {CLASSES[y]}"

    def seen(model, image):
        return attention(model, image, prompts[y]) * (1 - attention(model, image, other))

    a0 = seen(original, x)
    return (
        cross_entropy(logits(clip, adversarial, prompts[: len(CLASSES)]), y)
        + 0.10 * distance(seen(clip, adversarial), a0)
        + 0.07 * distance(seen(clip, x), a0)
    )


def agft(clip, original, x, adversarial, y, prompts):
    def cosines(model, image):
        f = naive.unit(feature(model, image))
        return torch.stack([(f * naive.unit(text(model, p))).sum() for p in prompts])

    q = (0.4 * 1.8 * original.scale * cosines(original, x)).exp()
    p = (1.8 * clip.scale * cosines(clip, adversarial)).exp()
    return -sum(a * b.log() for a, b in zip(q.detach() / q.sum().detach(), p / p.sum(), strict=True))


def sim_clip(clip, original, x, adversarial, y, prompts):
    clean, moved = naive.unit(feature(clip, x)), naive.unit(feature(clip, adversarial))
    return -(moved * clean.detach()).sum() / 2 - (clean * moved.detach()).sum() / 2


PLAIN = {
    "pmg-aft": pmg_aft,
    "fare": fare,
    "tga-zsr": tga_zsr,
    "comp-tga": comp_tga,
    "agft": agft,
    "sim-clip": sim_clip,
}
WITHOUT_TEXTS = ("fare", "sim-clip")


CAPTIONS = tuple(tuple(f"a {how} {what} {c}" for how, what in (("small", "grey"), ("big", "wet"))) for c in CLASSES)


def saft(clip, original, x, adversarial, y):
    """Mean over two caption sets of CE; the map of the true class's captions together."""
    sets = [[own[m] for own in CAPTIONS] for m in range(2)]
    mean_map = [attention(f, z, *CAPTIONS[y]) for f, z in ((original, x), (clip, adversarial), (clip, x))]
    return (
        sum(cross_entropy(logits(clip, adversarial, prompts), y) for prompts in sets) / 2
        + 0.08 * distance(mean_map[1], mean_map[0])
        + 0.05 * distance(mean_map[2], mean_map[0])
    )


def same_loss_and_gradient(chosen, plain):
    clip = tiny_clip(dtype=torch.float64)
    batch = attacked(clip, chosen, example(clip, 5, chosen))
    loss, metrics = chosen.loss(clip, batch)
    rows = zip(batch.pixels_BCHW, batch.adversarial_BCHW, batch.labels_B.tolist(), strict=True)
    expected = sum(plain(clip, batch.original.clip, x, x2, y) for x, x2, y in rows) / 5
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9) == metrics["loss"].item()
    assert not any(m.requires_grad for m in metrics.values())
    wanted = clip.parameters_of("image") if chosen.trains == "image" else list(clip.parameters())
    ours, theirs = (torch.autograd.grad(v, wanted) for v in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    assert any(g.abs().max() > 1e-5 for g in ours), "far above what the gradients may differ by"


@pytest.mark.parametrize(
    ("name", "trains"), [(n, t) for n in PLAIN for t in ("image", "all") if t == "image" or n not in WITHOUT_TEXTS]
)
def test_loss_and_gradient_agree_with_the_formula(name, trains):
    chosen = method(name, trains=trains)
    prompts = example(tiny_clip(), chosen=chosen).texts.prompts
    same_loss_and_gradient(chosen, lambda *args: PLAIN[name](*args, prompts))


@pytest.mark.parametrize("trains", ["image", "all"])
def test_saft_averages_over_captions(trains):
    same_loss_and_gradient(method("saft", sets=2, captions="", texts=CAPTIONS, trains=trains), saft)


@pytest.mark.parametrize("objective", ["cross_entropy", "mean_similarity"])
def test_saft_attacks_all_captions_at_once(objective):
    clip = tiny_clip(dtype=torch.float64)
    chosen = method("saft", sets=2, captions="", texts=CAPTIONS, objective=objective)
    batch = attacked(clip, chosen, example(clip, 4, chosen))
    texts = [[text(clip, c).detach() for c in own] for own in CAPTIONS]

    def loss(z, y):
        f = naive.unit(feature(clip, z))
        by_set = [torch.stack([clip.scale * (f * naive.unit(own[m])).sum() for own in texts]) for m in range(2)]
        if objective == "cross_entropy":
            return sum(cross_entropy(s, y) for s in by_set) / 2
        return -sum(s[y] for s in by_set) / 2

    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        y = int(batch.labels_B[i])
        expected = naive.ascend(
            lambda z, done, y=y: loss(z, y), x, key=key, eps=chosen.eps, step=chosen.step, steps=chosen.steps
        )
        assert torch.allclose(batch.adversarial_BCHW[i], expected, atol=1e-9)


def test_captions_cost_no_image_forwards():
    clip, counts = tiny_clip(), []
    clip.model.visual.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: counts.append(1))
    for sets in (1, 6):
        chosen = method("saft", sets=sets)
        counts.clear()
        chosen.loss(clip, attacked(clip, chosen, example(clip, 4, chosen)))
        assert len(counts) == chosen.steps + 2, "one a step of the attack, one for x' and one for x"


def test_one_template_of_saft_is_tga_zsr():
    clip = tiny_clip(dtype=torch.float64)
    values = []
    for chosen in (method("saft", sets=1), method("tga-zsr")):
        values.append(chosen.loss(clip, attacked(clip, chosen, example(clip, 4, chosen)))[0].item())
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_a_class_with_too_few_captions_is_named():
    with pytest.raises(UserError, match="dog"):
        make_method("saft", sets=2).with_texts([["a", "b"], ["c"]], ["cat", "dog"])
    with pytest.raises(UserError, match="16"):
        make_method("saft", sets=17, captions="templates")
    with pytest.raises(ValueError):
        make_method("saft").prompts(["cat", "dog"], "{}")


def test_fare_raises_the_distance_that_it_lowers():
    clip, chosen = tiny_clip(dtype=torch.float64), method("fare")
    batch = attacked(clip, chosen, example(clip, 4))
    f0 = [feature(batch.original.clip, x).detach() for x in batch.pixels_BCHW]
    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        expected = naive.ascend(
            lambda z, done, i=i: (feature(clip, z) - f0[i]).pow(2).sum(),
            x,
            key=key,
            eps=chosen.eps,
            step=chosen.step,
            steps=chosen.steps,
        )
        assert torch.allclose(batch.adversarial_BCHW[i], expected, atol=1e-9)


def test_tecoas_examples_serve_its_descendants():
    clip = tiny_clip()
    made = [attacked(clip, method(n), example(clip)).adversarial_BCHW for n in ("tecoa", "pmg-aft", "tga-zsr")]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_fare_computes_the_originals_features_once():
    clip = tiny_clip()
    batch, calls = example(clip), []
    batch.original.clip.model.visual.ln_pre.register_forward_hook(lambda *_: calls.append(1))
    chosen = method("fare")
    chosen.loss(clip, attacked(clip, chosen, batch))
    assert len(calls) == 1


def test_fare_cannot_train_texts():
    with pytest.raises(UserError, match="fare"):
        make_method("fare", trains="all")


def test_attention_needs_patches():
    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    with pytest.raises(UserError, match="tokens"):
        make_method("tga-zsr").check(tiny_clip(vision_cfg=tower))


def test_lore_descends_in_the_model_and_ascends_in_the_multiplier():
    """`adv + λ·(moved − rho·length)`; the optimiser descends, so that the network's gradient is turned round."""
    clip = tiny_clip(dtype=torch.float64)
    chosen = method("lore", rho=0.3, hidden=5)
    batch = attacked(clip, chosen, example(clip, chosen=chosen))
    first, second = batch.auxiliary[0], batch.auxiliary[2]
    loss, shown = chosen.loss(clip, batch)
    expected = 0
    for x, adversarial in zip(batch.pixels_BCHW, batch.adversarial_BCHW, strict=True):
        f0 = feature(batch.original.clip, x)
        hidden = (first.weight @ f0 + first.bias).clamp(min=0)
        multiplier = (1 + (second.weight @ hidden + second.bias).exp()).log()
        excess = distance(feature(clip, x), f0) ** 2 - 0.3 * f0.pow(2).sum()
        expected = expected + (distance(feature(clip, adversarial), f0) ** 2 + multiplier[0] * excess) / len(
            batch.labels_B
        )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9) and shown["multiplier"] > 0
    trained, network = clip.parameters_of(chosen.trains), list(batch.auxiliary.parameters())
    ours, theirs = (torch.autograd.grad(value, [*trained, *network]) for value in (loss, expected))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.allclose(a, b if i < len(trained) else -b, rtol=1e-6, atol=1e-9)
    assert max(g.abs().max() for g in ours[len(trained) :]) > 1e-3

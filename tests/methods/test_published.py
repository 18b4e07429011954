"""What the papers' code does, where it is not what the methods do otherwise: recipes, attacks, losses, prompts."""

from dataclasses import replace

import pytest
import torch

import naive
from conftest import tiny_clip
from methods.test_guided import cross_entropy, feature, kl, text
from methods.test_losses import attacked, example, method
from rayclip.attacks.bert import TextSettings
from rayclip.methods import METHODS, make_method
from rayclip.methods.ft_standard import FTStandard
from rayclip.methods.losses import class_cross_entropy
from rayclip.settings import format_defaults
from rayclip.training.loop import learning_rate, make_optimizer
from rayclip.training.step import attack_and_backward
from rayclip.types import UserError

# optimiser, lr, schedule, steps and epochs of warm-up, batch, epochs: of the public repositories' code
RECIPES = {
    "ft-standard": ("adam", 1e-6, "constant", 0, 0, 256, 30),
    "tecoa": ("sgd", 1e-5, "cosine", 1000, 0, 256, 10),
    "pmg-aft": ("sgd", 5e-5, "cosine", 1000, 0, 256, 10),
    "fare": ("adamw", 1e-5, "cosine", 1400, 0, 128, 2),
    "tga-zsr": ("sgd", 1e-4, "cosine", 1000, 0, 128, 10),
    "saft": ("sgd", 1e-4, "cosine", 1000, 0, 128, 10),
    "mmcoa": ("adam", 1e-6, "constant", 0, 0, 256, 30),
    "agft": ("sgd", 4e-4, "cosine", 1000, 0, 256, 10),
    "sim-clip": ("adamw", 1e-3, "cosine", 1400, 0, 128, 2),
    "lore": ("adamw", 1e-5, "cosine", 1400, 0, 128, 2),
    "comp-tga": ("sgd", 1e-4, "cosine", 1000, 0, 128, 10),
    "leaf": ("adamw", 1e-5, "cosine", 1400, 0, 128, 30),
    "advpt": ("sgd", 2e-3, "cosine", 0, 1, 32, 200),
    "apt": ("sgd", 2e-3, "cosine", 0, 1, 32, 200),
    "fap": ("sgd", 3.5e-3, "cosine", 0, 1, 4, 10),
    "vp": ("sgd", 40.0, "cosine", 1000, 0, 256, 10),
}


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_those_of_the_code(name):
    r = make_method(name).recipe_for(32)
    found = r.optimizer, r.lr, r.schedule, r.warmup_steps, r.warmup_epochs, r.batch_size, r.epochs
    assert found == RECIPES[name]
    if r.optimizer == "adam":
        assert (r.betas, r.adam_eps, r.weight_decay) == ((0.9, 0.98), 1e-6, 0.2)
    elif r.optimizer == "adamw":
        assert (r.betas, r.weight_decay) == ((0.9, 0.999), 1e-4)
        (group,) = make_optimizer(r, [torch.nn.Parameter(torch.zeros(1))]).param_groups
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8), "torch's own"
    else:
        assert r.momentum == 0.9


def test_recipes_that_depend_on_the_model_or_on_what_is_trained():
    assert [make_method("advpt").recipe_for(patch).epochs for patch in (32, 16, 14, None)] == [200, 100, 100, 200]
    clip_ft = make_method("ft-standard", trains="image").recipe_for(32)
    assert clip_ft == FTStandard.image_recipe and (clip_ft.optimizer, clip_ft.lr, clip_ft.batch_size) == (
        "sgd",
        1e-4,
        128,
    )


def test_published_settings_are_defaults_that_give_way():
    assert make_method("mmcoa", published=True).against == "pgd" and make_method("mmcoa").against == "own"
    assert make_method("pmg-aft", published=True).form == "published"
    advpt = make_method("advpt", published=True)
    assert (advpt.eps, advpt.steps, advpt.context) == (8 / 255, 10, 32)
    assert advpt.step_length == pytest.approx(1.25 * 8 / 255 / 10)
    apt, fap = make_method("apt", published=True), make_method("fap", published=True)
    assert (apt.eps, apt.steps, apt.context, apt.prompting) == (1 / 255, 3, 16, "on-the-fly")
    assert apt.step_length == pytest.approx(2 / 3 / 255) and fap.step_length == 1 / 255
    assert (fap.eps, fap.steps, fap.weight, fap.tokens, fap.depth) == (1 / 255, 2, 1.5, 2, 9)
    vp = make_method("vp", published=True, tokens=100)
    assert (vp.frame, vp.tokens) == ("normal", 100)
    assert (make_method("fare").eps, make_method("fare").attack_momentum) == (4 / 255, 0.9)
    assert make_method("mmcoa", published=True, against="cw").against == "cw"


def test_a_step_that_is_not_given_crosses_the_ball():
    assert make_method("tecoa").step_length == 1 / 255
    wide = make_method("tecoa", eps=32 / 255, steps=10)
    assert wide.step_length == pytest.approx(2.5 * 32 / 255 / 10) and wide.describe()["step"] == wide.step_length
    assert wide.weakened(0.5).step_length == pytest.approx(wide.step_length / 2)
    assert make_method("tecoa", eps=0.5, steps=10, norm="l2").step_length == pytest.approx(0.125)


def test_the_warm_up_is_as_long_as_written_or_a_tenth():
    recipe = replace(make_method("tecoa").recipe, lr=1.0)
    assert learning_rate(recipe, 50, 1000) == pytest.approx(0.51), "a tenth of the run: 100 steps"
    whole = replace(recipe, warmup_whole=True)
    assert [learning_rate(whole, step, 1000) for step in (0, 50, 999)] == pytest.approx([0.001, 0.051, 1.0])
    assert learning_rate(whole, 1499, 2000) == pytest.approx(0.5, abs=0.01)


def test_advpt_warms_up_for_an_epoch_at_a_constant_rate():
    recipe = make_method("advpt").recipe
    rates = [learning_rate(recipe, step, 200 * 50) for step in (0, 49, 50, 10_000)]
    assert rates == pytest.approx([1e-5, 1e-5, 2e-3, 0.0])


def unscaled(clip, image, prompts):
    f = naive.unit(feature(clip, image))
    return torch.stack([(f * naive.unit(text(clip, p))).sum() for p in prompts])


def test_pmg_aft_as_published_has_no_temperature_and_sums_the_divergences():
    clip = tiny_clip(dtype=torch.float64)
    chosen = method("pmg-aft", form="published", trains="image")
    batch = attacked(clip, chosen, example(clip, 5))
    prompts, original = batch.texts.prompts, batch.original.clip
    mean, summed = 0.0, 0.0
    for x, made, y in zip(batch.pixels_BCHW, batch.adversarial_BCHW, batch.labels_B.tolist(), strict=True):
        z = unscaled(clip, made, prompts)
        mean = mean + cross_entropy(z, y) / 5
        summed = summed + kl(unscaled(original, made, prompts), z) + kl(unscaled(clip, x, prompts), z)
    expected, (loss, metrics) = mean + summed, chosen.loss(clip, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9) == metrics["loss"].item()
    wanted = clip.parameters_of("image")
    for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    scaled = method("pmg-aft", trains="image").loss(clip, batch)[0]
    assert abs(scaled.item() - loss.item()) > 0.01
    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        y = int(batch.labels_B[i])
        made = naive.ascend(
            lambda z, done, y=y: cross_entropy(unscaled(clip, z, prompts), y),
            x,
            key=key,
            eps=chosen.eps,
            step=chosen.step,
            steps=chosen.steps,
        )
        assert torch.allclose(batch.adversarial_BCHW[i], made, atol=1e-9)


@pytest.mark.parametrize("trains", ["image", "all"])
def test_pmg_aft_as_published_in_parts_is_the_whole(trains):
    found = []
    for parts in (1, 3):
        clip = tiny_clip(dtype=torch.float64)
        chosen = method("pmg-aft", form="published", trains=trains)
        module = torch.nn.Module()
        module.forward = lambda batch, clip=clip, chosen=chosen: chosen.loss(clip, batch)
        module.clip = clip
        metrics = attack_and_backward(module, clip, chosen, example(clip, 5), parts)
        grads = [p.grad.flatten() for p in clip.parameters_of(trains)]  # of all, the temperature's too: it is 0
        found.append(torch.cat([metrics["loss"].view(1), *grads]))
    assert torch.allclose(*found, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fares_attack_has_the_momentum_of_its_code(norm):
    """In l_inf it is felt where the gradient is exactly 0 alone: half the image is cut off from the loss there."""
    clip = tiny_clip(dtype=torch.float64)
    eps, step = (8 / 255, 2 / 255) if norm == "linf" else (0.5, 0.1)
    chosen = make_method("fare", eps=eps, step=step, steps=4, norm=norm)
    batch = example(clip, 3)
    f0 = [feature(batch.original.clip, x).detach() for x in batch.pixels_BCHW]

    def unit(x):
        return x.sign() if norm == "linf" else x / x.norm()

    def climb(x, start, momentum, i):
        d, v = start - x, torch.zeros_like(x)
        for _ in range(4):
            z = (x + d).requires_grad_()
            g = torch.autograd.grad((feature(clip, z) - f0[i]).pow(2).sum(), z)[0]
            v = unit(momentum * v + unit(g))
            d = d + step * v
            d = d.clamp(-eps, eps) if norm == "linf" else d * min(1.0, eps / d.norm())
            d = (x + d).clamp(0, 1) - x
        return x + d

    made = attacked(clip, chosen, batch).adversarial_BCHW
    starts = attacked(clip, replace(chosen, steps=0), batch).adversarial_BCHW
    for i, x in enumerate(batch.pixels_BCHW):
        assert torch.allclose(made[i], climb(x, starts[i], 0.9, i), atol=1e-9)
        if norm == "l2":
            assert not torch.allclose(made[i], climb(x, starts[i], 0.0, i), atol=1e-4)
    if norm == "linf":
        attack, zero = chosen.image_attack(), torch.zeros(1, 3, 2, 2)
        going = attack.follow(zero, torch.ones(1, 3, 2, 2))
        assert torch.equal(attack.follow(going, zero), going), "where there is no gradient, it goes on"
        assert torch.equal(attack.follow(going, -torch.ones(1, 3, 2, 2)), -going)


def test_mmcoas_published_attack_raises_the_cross_entropy_over_the_class_prompts():
    clip = tiny_clip(dtype=torch.float64)
    chosen = make_method("mmcoa", published=True, eps=8 / 255, steps=3, step=4 / 255, lambda_txt=0.0)
    batch = example(clip)
    as_tecoa = attacked(clip, method("tecoa"), batch).adversarial_BCHW
    made = attacked(clip, chosen, batch).adversarial_BCHW
    assert torch.equal(made, as_tecoa)
    own = attacked(clip, replace(chosen, against="own"), batch).adversarial_BCHW
    assert not torch.equal(made, own)
    losses = [
        class_cross_entropy(clip.encode_image(x), batch.texts.all(), batch.labels_B, clip.scale).mean()
        for x in (made, own)
    ]
    assert losses[0] > losses[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vp:tokens", "write KEY=VALUE"),
        ("vp:tokens=ten", "no whole number"),
        ("vp:tokens=-1", "at least 0"),
        ("vp:frame=round", "one of empty, normal"),
        ("tecoa:tokens=10", "method 'tecoa' has no setting 'tokens'"),
        ("tecoa:lambda_img=3", "method 'tecoa' has no setting 'lambda_img'"),
        ("mmcoa:lamda_img=3", "did you mean lambda_img"),
        ("mmcoa:text=mine", "no setting 'text'"),
        ("saft:texts=mine", "no setting 'texts'"),
        ("pmg-aft:form=own", "one of scaled, published"),
        ("tecoo:form=own", "did you mean tecoa"),
        ("tecoa,mmcoa", "takes one name"),
        ("vp:tokens=1,tokens=2", "twice"),
    ],
)
def test_settings_that_cannot_be_are_explained(text, says):
    with pytest.raises(UserError, match=says):
        make_method(text)


def test_every_setting_of_every_method_can_be_written():
    for name, kind in METHODS.items():
        for key, default in format_defaults(kind).items():
            value = ("1/255" if key == "step" else "1") if default == "…" else default
            assert make_method(f"{name}:{key}={value}").name == name, key
    assert make_method("vp:tokens=0", published=True).tokens == 0
    assert make_method("mmcoa:k=4,offset=reference").text == TextSettings(k=4, offset="reference")
    assert make_method("tecoa:norm=l2,eps=2").eps == 2.0


def test_what_is_written_takes_precedence():
    values = {"form": "published", "lambda_clean": 0.5}
    assert make_method("pmg-aft:form=published,lambda_clean=0.5") == make_method("pmg-aft", **values)
    assert make_method("pmg-aft:lambda_clean=2", **values).lambda_clean == 2
    assert make_method("mmcoa:substitutes=clip-table", defaults={"substitutes": "m"}).text.substitutes == "clip-table"
    assert make_method("tecoa", defaults={"substitutes": "m"}) == make_method("tecoa")
    with pytest.raises(UserError, match="lambda_img"):
        make_method("tecoa", lambda_img=0.3)

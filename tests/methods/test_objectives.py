"""A training attack with another objective than the method's own agrees with its formula in float64."""

from dataclasses import replace

import pytest
import torch

import naive
from conftest import tiny_clip
from methods.test_losses import CLASSES, ON_IMAGES, attacked, example, method
from rayclip.types import UserError


def plain(name, clip, prompts, sets, x, y):
    """What the attack raises for one image: of several texts a class the mean."""
    texts = [naive.unit(t.detach()) for t in clip.encode_text(clip.tokenize(prompts), normalize=False)]
    classes = len(texts) // sets
    clean = clip.encode_image(x[None], normalize=False)[0].detach()

    def loss(z, done):
        f = clip.encode_image(z[None], normalize=False)[0]
        if name == "feature":
            return (f - clean).pow(2).sum()
        total = 0.0
        for m in range(sets):
            scores = [clip.scale * (naive.unit(f) * t).sum() for t in texts[m * classes : (m + 1) * classes]]
            if name == "pgd":
                total = total + torch.logsumexp(torch.stack(scores), 0) - scores[y]
            else:
                total = total + naive.cw(scores, y)
        return total / sets

    return loss


@pytest.mark.parametrize("objective", ["pgd", "cw", "feature"])
@pytest.mark.parametrize("name", ON_IMAGES)
def test_it_is_the_named_attacks(name, objective):
    chosen = method(name, against=objective)
    clip = chosen.wrap_model(tiny_clip(dtype=torch.float64), seed=0).requires_grad_(False)
    chosen.check_attack()
    batch = example(clip, 4, chosen)
    prompts = batch.texts.prompts[: len(CLASSES) * chosen.texts_per_class]  # comp-tga has others behind them
    made = attacked(clip, chosen, batch).adversarial_BCHW
    for i, (x, key) in enumerate(zip(batch.pixels_BCHW, batch.keys_B.tolist(), strict=True)):
        loss = plain(objective, clip, prompts, chosen.texts_per_class, x, int(batch.labels_B[i]))
        expected = naive.ascend(loss, x, key=key, eps=chosen.eps, step=chosen.step, steps=chosen.steps)
        assert torch.allclose(made[i], expected, atol=1e-9)
    own = attacked(clip, replace(chosen, against="own"), batch).adversarial_BCHW
    same = torch.equal(made, own)
    others = ("fare", "sim-clip", "lore", "mmcoa", "agft", "fap")
    assert same == (objective == "pgd" and name not in others), "the rest's own is the cross-entropy"


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("tecoa", {"against": "square"}, "--attack 'square' is no training attack: use own or one of pgd, cw, feature"),
        ("tecoa", {"against": "pgd-l2"}, "'pgd-l2' is no training attack"),
        ("mmcoa", {"against": "feature", "start": "zero"}, "start=zero"),
        ("ft-standard", {"against": "pgd"}, "trains on clean images"),
        ("advpt", {"against": "pgd"}, "leave --attack away"),
        ("leaf", {"against": "pgd"}, "leave --attack away"),
        ("leaf", {"trains": "image"}, "use --trains text"),
        ("fare", {"trains": "text"}, "use --trains image"),
        ("vp", {"against": "nothing"}, "'nothing' is no training attack"),
    ],
)
def test_what_cannot_be_trained_against_is_refused(name, settings, says):
    with pytest.raises(UserError, match=says):
        method(name, **settings).check(tiny_clip())

"""LoRA: peft's factors, an ordinary model around them, and a run that goes on where it was."""

from dataclasses import replace

import pytest
import torch

from conftest import tiny_clip
from rayclip.methods import METHODS
from rayclip.models import load_model
from rayclip.models.fast import fast_copy, refresh
from rayclip.models.lora import Lora, LoraSettings
from rayclip.training import train
from rayclip.types import UserError
from training.test_loop import LocalHost, config

pytest.importorskip("peft")


def made(part="all", rank=3):
    clip = tiny_clip()
    clip.requires_grad_(False)
    lora = Lora(clip, LoraSettings(rank=rank, alpha=5, part=part), 7)
    with torch.no_grad():
        for factor in lora.factors:
            factor.add_(0.05 * torch.randn_like(factor))
    lora.apply()
    return clip, lora


def test_weights_and_gradients_are_those_of_the_formula():
    """W0 + (alpha/r)·B·A in every block, and what autograd gives for A and B through it."""
    clip, lora = made()
    before = tiny_clip().model.state_dict()
    changed = {name for name, x in clip.model.state_dict().items() if not torch.equal(x, before[name])}
    blocks = [f"{tower}transformer.resblocks.{i}." for tower in ("", "visual.") for i in (0, 1)]
    layers = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert changed == {block + layer for block in blocks for layer in layers}
    factors = [p.detach().clone().requires_grad_() for p in lora.factors]
    names = [name for name, p in clip.model.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(changed)
    pairs = {name: (a, b) for name, a, b in zip(in_order(clip, names), factors[::2], factors[1::2], strict=True)}
    weights = {name: before[name] + 5 / 3 * b @ a for name, (a, b) in pairs.items()}
    for name, weight in weights.items():
        assert torch.allclose(clip.model.get_parameter(name), weight, atol=1e-6), name
    images, tokens = torch.rand(2, 3, 8, 8), clip.tokenize(["a cat", "a dog"])

    def loss(model):
        return (model.encode_image(images) * model.encode_text(tokens)).sum().exp()

    loss(clip).backward()
    lora.take_gradients()
    plain = tiny_clip().requires_grad_(False)
    torch.func.functional_call(Whole(plain, loss), {f"clip.model.{n}": w for n, w in weights.items()}, ()).backward()
    for mine, reference in zip(lora.factors, factors, strict=True):
        assert torch.allclose(mine.grad, reference.grad, rtol=1e-4, atol=1e-6) and mine.grad.abs().max() > 0
    assert all(p.grad is None for p in clip.parameters())


class Whole(torch.nn.Module):
    def __init__(self, clip, loss):
        super().__init__()
        self.clip, self.loss = clip, loss

    def forward(self):
        return self.loss(self.clip)


def in_order(clip, names):
    """The weights in the order of the model's modules, as the factors are."""
    return sorted(names, key=[name for name, _ in clip.model.named_parameters()].index)


def test_a_reduced_copy_for_attacks_has_the_changed_weights():
    clip, lora = made("image")
    copied, images = fast_copy(clip, "fp16"), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        for factor in lora.factors:
            factor.mul_(3)
    lora.apply()
    stale = copied.encode_image(images)
    refresh(copied)
    assert torch.allclose(copied.encode_image(images), clip.encode_image(images), atol=1e-2)
    assert not torch.allclose(stale, clip.encode_image(images), atol=1e-2)


@pytest.mark.ci
def test_a_run_is_repeatable_resumed_and_leaves_an_ordinary_checkpoint(tmp_path):
    settings = config("tecoa", ema=0.5)
    settings = replace(settings, recipe=replace(settings.recipe, lr=1e-2))
    settings = replace(settings, method=replace(settings.method, trains="lora:rank=2"))
    whole = LocalHost(tmp_path / "whole")
    reference = train(settings, whole)
    losses = [whole.curve[step]["loss"] for step in sorted(whole.curve)]
    assert sum(losses[-2:]) < sum(losses[:2])
    saved = load_model(f"local-dir:{whole.checkpoints[-1]}")
    assert saved.fingerprint() == reference.fingerprint() != load_model("digits").fingerprint()
    base = load_model("digits").model.state_dict()
    ranks = [
        torch.linalg.matrix_rank(x - base[n], tol=1e-5).item()
        for n, x in saved.model.state_dict().items()
        if x.ndim == 2
    ]
    assert max(ranks) == 2, "a change of low rank, and nothing else"
    first = LocalHost(tmp_path / "first", until=2)
    with pytest.raises(InterruptedError):
        train(settings, first)
    second = LocalHost(tmp_path / "second", start=first.checkpoints[-1])
    assert train(settings, second).fingerprint() == reference.fingerprint()
    assert first.curve | second.curve == whole.curve


def test_what_lora_trains_is_the_methods_own_part_unless_named():
    methods = {name: kind for name, kind in METHODS.items() if kind.trains != "prompt"}
    for kind in methods.values():
        method = replace(kind(), trains="lora:rank=4")
        assert (method.part, method.lora.rank, method.lora.alpha) == (kind.trains, 4, None)
        assert replace(method, trains="lora:rank=4,part=last-1").part == "last-1"
    method = METHODS["tecoa"]()
    for wrong in ("lora:rank=0", "lora:rank=x", "lora:depth=2", "lora:rank=2,part=head", "lora:alpha=-1"):
        with pytest.raises(UserError):
            replace(method, trains=wrong).check(tiny_clip())

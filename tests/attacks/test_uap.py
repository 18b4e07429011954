"""One perturbation for all images: what a file may hold, what is added, and that one that was made does harm."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from attacks.test_gradient import balanced, batch
from calling import call
from rayclip.attacks import Samples, make_attack
from rayclip.data import batch_pixels, open_data
from rayclip.models import ZeroShot, load_model
from rayclip.types import UserError


@pytest.mark.parametrize("fit", ["clip", "scale"])
@pytest.mark.parametrize("ending, size", [("npy", 8), ("pt", 8), ("safetensors", 16)])
def test_the_files_perturbation_is_added(tmp_path, ending, size, fit):
    drawn = (torch.rand(3, size, size, generator=torch.Generator().manual_seed(1)) - 0.5) / 5
    place = tmp_path / f"mine.{ending}"
    if ending == "npy":
        np.save(place, drawn.numpy())
    elif ending == "pt":
        torch.save({"delta": drawn[None]}, place)
    else:
        save_file({"delta": drawn[None]}, place)
    victim, eps = balanced(), 8 / 255
    images, labels, todo, keys = batch(victim, n=5)
    todo[2] = False
    attack = make_attack("uap", file=str(place), fit=fit).pinned()
    made = attack.run(victim, Samples(images, labels, keys, todo), eps=eps)
    wanted = F.interpolate(drawn[None], size=(8, 8), mode="bilinear")[0] if size != 8 else drawn
    wanted = wanted * eps / drawn.abs().max() if fit == "scale" else wanted
    for i, image in enumerate(images):
        moved = (image + wanted.clamp(-eps, eps)).clamp(0, 1) if i != 2 else image
        assert torch.allclose(made.images_BCHW[i], moved, rtol=0, atol=1e-6)
    assert attack.label == "uap_mine" and len(attack.describe()["file"]) == 16
    changed = dataclasses.replace(attack, fingerprint="0" * 16)
    with pytest.raises(UserError, match="mine"):
        changed.run(victim, Samples(images, labels, keys, todo), eps=eps)


@pytest.mark.parametrize(
    "held, says",
    [
        (torch.rand(3, 8, 8) * 255, "divide bytes by 255"),
        (torch.rand(2, 3, 8, 8), "one tensor"),
        (torch.full((3, 8, 8), torch.nan), "pixel units"),
        ({"a": torch.rand(3, 8, 8), "b": torch.rand(3, 8, 8)}, "one tensor"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, held, says):
    torch.save(held, tmp_path / "other.pt")
    images, labels, todo, keys = batch(balanced(), n=2)
    for place, word in ((tmp_path / "other.pt", says), (tmp_path / "none.pt", "cannot be read")):
        with pytest.raises(UserError, match=word):
            attack = make_attack("uap", file=str(place)).pinned()
            attack.run(balanced(), Samples(images, labels, keys, todo), eps=8 / 255)
    with pytest.raises(UserError, match="uap:file="):
        make_attack("uap")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--eps", "8", "8/255"),
        ("--step-size", "x", "--step-size"),
        ("--template", "a cat", "a cat"),
        ("--template", "{} and {}", "once"),
        ("--data", "nope", "nope"),
        ("--model", "nope", "nope"),
        ("--out", "made.pt", ".safetensors"),
        ("--out", "/nowhere/made.safetensors", "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, option, value, says):
    monkeypatch.chdir(tmp_path)
    given = {"--model": "digits", "--data": "digits", "--out": "made.safetensors", option: value}
    code, _, err = call(monkeypatch, capsys, "uap", *(word for pair in given.items() for word in pair))
    assert code == 2 and err.count("\n") == 1 and says in err and not list(tmp_path.iterdir())


@pytest.mark.ci
@pytest.mark.parametrize("objective", ["embedding", "labels"])
def test_one_that_was_made_fools_more_than_noise(tmp_path, monkeypatch, capsys, objective):
    """Made on 200 train digits, added to 100 test digits; noise of the same size changes next to nothing."""
    where = ("--model", "digits", "--data", "digits", "--out", str(tmp_path / "made.safetensors"))
    chosen = ("--limit", "200", "--epochs", "6", "--batch", "50", "--step-size", "4/255", "--objective", objective)
    code, said, err = call(monkeypatch, capsys, "uap", *where, "--eps", "48/255", *chosen)
    assert code == 0 and "made.safetensors" in said, err
    made = load_file(tmp_path / "made.safetensors")["delta"]
    assert made.shape == (1, 3, 8, 8) and made.abs().max() <= 48 / 255 + 1e-6
    torch.save(made.sign()[:, :, torch.randperm(8)][..., torch.randperm(8)] * 48 / 255, tmp_path / "noise.pt")
    data = open_data("digits", "test")
    positions = list(range(0, 400, 4))
    victim = ZeroShot(load_model("digits"), data.class_names)
    images, labels = batch_pixels(data, positions, "native", 8).float() / 255, torch.from_numpy(data.labels[positions])
    held = {}
    for name in ("made.safetensors", "noise.pt"):
        attack = make_attack("uap", file=str(tmp_path / name))
        moved = attack.run(victim, Samples(images, labels, torch.zeros(100).long()), eps=48 / 255).images_BCHW
        held[name] = (victim(moved).argmax(1) == labels).float().mean().item()
    assert held["made.safetensors"] < held["noise.pt"] - 0.1, held

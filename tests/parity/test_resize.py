"""The papers' resize of native images: its pixels, and what it does to clean and robust accuracy."""

import pytest
import torch
from torch.nn import functional as F

from parity.inputs import cifar, equal_share, golden, places
from rayclip.attacks import make_attack
from rayclip.models.resizing import resized
from rayclip.units import parse_budget

pytestmark = pytest.mark.ci

GOLDEN = golden("resize")


@pytest.fixture(scope="module")
def images(shared):
    return cifar(shared, 96, 4000)


@pytest.fixture(scope="module")
def small(images):
    """The images at 16 px, a model of 32 px that resizes as the papers' code."""
    pixels = F.interpolate(images.pixels, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    plain = images.model.with_clip(images.model.clip.with_resize("plain"))
    return images._replace(pixels=pixels, model=plain)


def test_the_pixels_that_the_papers_code_makes_of_32_px(images):
    ours = {how: places(resized(images.pixels[:4], 224, how)) for how in ("plain", "antialias")}
    theirs = GOLDEN["enlarged"]["pixels"]
    assert equal_share(ours["plain"], theirs) == 1
    assert equal_share(ours["antialias"], theirs) < 0.5


@pytest.mark.slow
def test_the_papers_accuracies_image_by_image(small):
    run = GOLDEN["pgd"]
    assert small.stands(small.pixels) == run["clean_stands"]
    attack = make_attack("pgd", steps=run["steps"], step=parse_budget(run["step"]), stop="final")
    made = attack.run(small.model, small.samples, eps=parse_budget(run["eps"])).images_BCHW
    assert small.stands(made) == run["stands"]
    with torch.no_grad():
        losses = F.cross_entropy(small.model(made), small.labels, reduction="none").tolist()
    assert losses == pytest.approx(run["loss"], abs=2e-3)
    assert equal_share(places(made - small.pixels), run["change"]) > 0.995
    assert (round(100 * run["clean_stands"].count("1") / 96, 1), round(100 * run["stands"].count("1") / 96, 1)) == (
        41.7,
        15.6,
    )


@pytest.mark.slow
def test_anti_aliasing_gives_other_numbers(small):
    """The reason why the resize is a part of every protocol."""
    antialias = small._replace(model=small.model.with_clip(small.model.clip.with_resize("antialias")))
    made = make_attack("pgd", steps=10, stop="final").run(antialias.model, small.samples, eps=1 / 255).images_BCHW
    found = antialias.stands(small.pixels).count("1"), antialias.stands(made).count("1")
    assert found == (37, 18)  # 38.5 and 18.8 %

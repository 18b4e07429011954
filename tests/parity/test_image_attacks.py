"""PGD, CW and FGSM, pixel by pixel, beside the papers' code and two libraries."""

import pytest
import torch
from torch.nn import functional as F

from parity.inputs import Images, cifar, digits, equal_share, golden, places
from rayclip.attacks import Samples, make_attack
from rayclip.units import parse_budget

pytestmark = pytest.mark.ci

OTHERS = ("ZSRobust4FoundationModel-pgd-2_255-10-zero", "ZSRobust4FoundationModel-cw-1_255-10-random")
OF_LIBRARIES = ("torchattacks-fgsm-1_255-1-zero", "foolbox-pgd-l2-63.75_255-10-zero")
BY_PAPERS, BY_LIBRARIES = golden("pgd")["runs"], golden("libraries")["runs"]


def title(run):
    made = run["obtained"]
    who = made.get("repository", made.get("package")).rpartition("/")[2]
    return f"{who}-{run['attack']}-{run['eps'].replace('/', '_')}-{run.get('steps', 1)}-{run['start']}"


def settings(run):
    given = {"stop": "final", "start": run["start"], "steps": run.get("steps", 1)}
    return given | ({"step": parse_budget(run["step"])} if "step" in run else {})


def nightly(runs, kept):
    """Each run is a case; those that are neither of other settings nor of another objective are marked slow."""
    return [pytest.param(run, marks=() if title(run) in kept else pytest.mark.slow, id=title(run)) for run in runs]


def attacked(run, images: Images):
    attack = make_attack(run["attack"], **({} if run["attack"] == "fgsm" else settings(run)))
    return attack.run(images.model, images.samples, eps=parse_budget(run["eps"])).images_BCHW


def check(run, images, made):
    """The same images stand; the same losses, the same pixels."""
    assert images.stands(made) == run["stands"]
    # Our FGSM leaves images alone that are wrong already
    those = [i for i, right in enumerate(images.stands(images.pixels)) if right == "1" or run["attack"] != "fgsm"]
    with torch.no_grad():
        losses = F.cross_entropy(images.model(made), images.labels, reduction="none").tolist()
    change = places(made - images.pixels)
    assert [losses[i] for i in those] == pytest.approx([run["loss"][i] for i in those], abs=2e-3)
    assert equal_share([change[i] for i in those], [run["change"][i] for i in those]) > 0.995


@pytest.mark.parametrize("run", nightly(BY_PAPERS, OTHERS))
def test_beside_the_papers_code(run, first_images):
    check(run, first_images, attacked(run, first_images))


@pytest.mark.parametrize("run", nightly([r for r in BY_PAPERS if r["steps"] == 10], OTHERS[1:]))
def test_stopping_at_the_first_success_breaks_no_fewer(run, first_images):
    """Whatever stands after the papers' last iterate or not: an image that any iterate has fooled is broken."""
    images = first_images
    with torch.no_grad():
        todo = images.model(images.pixels).argmax(1) == images.labels
    samples = Samples(images.pixels, images.labels, images.keys, todo)
    attack = make_attack(run["attack"], **(settings(run) | {"stop": "first_success"}))
    stands = images.stands(attack.run(images.model, samples, eps=parse_budget(run["eps"])).images_BCHW)
    assert all(ours <= theirs for ours, theirs in zip(stands, run["stands"], strict=True))


@pytest.fixture(scope="module")
def library_images(shared):
    return cifar(shared, 32, 2000)


@pytest.mark.parametrize("run", nightly(BY_LIBRARIES, OF_LIBRARIES))
def test_beside_torchattacks_and_foolbox(run, library_images):
    check(run, library_images, attacked(run, library_images))


@pytest.mark.slow  # as of the official code in test_autoattack.py
def test_fab_beside_torchattacks():
    """FAB seeks the nearest boundary, from which both stop where they stand: the same images to one or two."""
    run, images = golden("libraries")["fab"], digits(48, 200)
    assert images.stands(images.pixels) == run["clean_stands"]
    made = make_attack("fab-t", iterations=run["iterations"]).run(
        images.model, images.samples, eps=parse_budget(run["eps"])
    )
    ours = images.stands(made.images_BCHW)
    differ = sum(a != b for a, b in zip(ours, run["stands"], strict=True))
    assert differ <= 1, (ours.count("1"), run["stands"].count("1"))

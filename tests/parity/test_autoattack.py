"""AutoAttack's parts beside the official code, on digits at 24/255. Both draw random numbers of their own, so that
single images on the boundary fall to the one and not to the other."""

import pytest

from parity.inputs import golden
from rayclip.attacks import make_attack
from rayclip.units import parse_budget

pytestmark = pytest.mark.ci

RUNS = {run["attack"]: run for run in golden("autoattack")["runs"]}


def stands(name, images):
    run = RUNS[name]
    attack = make_attack(name, iterations=run["iterations"])
    return images.stands(attack.run(images.model, images.samples, eps=parse_budget(run["eps"])).images_BCHW)


@pytest.mark.parametrize("name", ["apgd-t", pytest.param("fab-t", marks=pytest.mark.slow)])
def test_the_same_images_stand(name, digit_images):
    ours = stands(name, digit_images)
    differ = sum(a != b for a, b in zip(ours, RUNS[name]["stands"], strict=True))
    assert differ <= 1, (ours.count("1"), RUNS[name]["stands"].count("1"))


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_images_that_every_seed_of_the_official_code_decides_alike_are_so_decided(name, digit_images):
    """With another seed the official code itself leaves 14 to 16 (cross-entropy) and 17 to 22 (DLR) standing."""
    ours, seeds = stands(name, digit_images), [RUNS[name]["stands"], *RUNS[name]["other_seeds"]]
    sure = {i: mine for i, mine in enumerate(ours) if len({seed[i] for seed in seeds}) == 1}
    assert len(sure) >= 45
    assert sum(mine != seeds[0][i] for i, mine in sure.items()) <= 1
    counts = [seed.count("1") for seed in seeds]
    assert min(counts) - 1 <= ours.count("1") <= max(counts)


def test_the_official_numbers_are_the_ones_on_record():
    found = [RUNS[name]["stands"].count("1") for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "autoattack")]
    assert found == [14, 20, 12, 14, 12]


@pytest.mark.slow  # 5,000 queries a standing image: minutes
def test_the_whole_beside_the_official_one(digit_images):
    run = RUNS["autoattack"]
    attack = make_attack("autoattack")
    ours = digit_images.stands(
        attack.run(digit_images.model, digit_images.samples, eps=parse_budget(run["eps"])).images_BCHW
    )
    assert sum(a != b for a, b in zip(ours, run["stands"], strict=True)) <= 1

"""What the papers' code computes where ours once did not: PMG-AFT as published, SAFT's order of mean and scaling."""

import pytest

from parity.test_losses import ATTACKS, LOSSES, check_attack, check_loss, images, moved, ours

pytestmark = pytest.mark.ci

__all__ = ["images", "moved"]  # fixtures


@pytest.mark.parametrize("name", ["PMG-AFT as published", "SAFT, each token normalised"])
def test_the_same_loss_and_gradient(name, moved, images):
    check_loss(LOSSES[name], moved, images)


def test_saft_as_published_differs_in_its_norm_alone(moved, images):
    run = LOSSES["SAFT as published"]
    found, _, _ = ours(run, moved, images)
    assert 0 < abs(found["gradient_norm"] / run["gradient_norm"] - 1) < 0.02


def test_the_training_attack_without_a_temperature(moved, images):
    check_attack(ATTACKS["PMG-AFT as published"], moved, images)

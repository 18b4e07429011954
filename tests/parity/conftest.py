"""Each set of images is read once; those of CIFAR-10 only where a developer has them."""

from pathlib import Path

import pytest

from parity.inputs import Images, cifar, right_digits


@pytest.fixture(scope="session")
def first_images(shared: Path) -> Images:
    return cifar(shared, 60)


@pytest.fixture(scope="session")
def digit_images() -> Images:
    return right_digits(60)

import pytest
import torch

import naive
from rayclip.rng import gaussian, philox, sample_keys, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),  # the known answers published with Random123
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = [torch.tensor([int(w, 16) for w in text.split()]) for text in (counter, key)]
    assert philox(*words).tolist() == [int(w, 16) for w in expected.split()]


def test_uniform_agrees_with_plain_integers():
    keys = sample_keys([0, 7, 1234567], 3, "data", "pgd")
    for stream in (0, 5):
        ours = uniform(keys, (3, 5), stream=stream)
        for row, key in zip(ours, keys.tolist(), strict=True):
            assert torch.equal(row.double(), naive.uniforms(key, (3, 5), stream))


def test_a_sample_has_its_own_noise_whatever_the_batch():
    whole = uniform(sample_keys(range(50), 0), (3, 8, 8))
    assert torch.equal(whole[20:30], uniform(sample_keys(range(20, 30), 0), (3, 8, 8)))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, uniform(sample_keys(range(50), 1), (3, 8, 8)))


def test_distributions_have_their_moments():
    keys = sample_keys(range(200), "moments")
    u, g = uniform(keys, (1000,)), gaussian(keys, (1000,))
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.003) and u.var().item() == pytest.approx(1 / 12, abs=0.001)
    assert g.mean().item() == pytest.approx(0, abs=0.01) and g.var().item() == pytest.approx(1, abs=0.02)

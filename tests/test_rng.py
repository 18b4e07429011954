import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import naive
from rayclip.attacks import geometry
from rayclip.rng import _uniform, fused, gaussian, philox, sample_keys, uniform


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


@pytest.mark.ci
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_for_any_size_draws_and_steps_have_the_same_bits(backend):
    options = {"backend": backend, "dynamic": True, "fullgraph": True}
    draw, step = (torch.compile(chain.__wrapped__, **options) for chain in (_uniform, geometry._advance_linf))
    for count, shape, stream in ((3, (3, 8, 8), 0), (5, (3, 7, 5), 7), (1, (3, 8, 8), 1), (4, (1, 1, 1), 2)):
        keys, stream_1 = sample_keys(range(count), 0), torch.tensor([stream])
        expected = uniform(keys, shape, stream=stream)
        assert torch.equal(draw(keys, stream_1, expected[0].numel(), torch.float32), expected.flatten(1))
        clean, delta, gradient = torch.rand(3, count, *shape)
        given = 0.02 * (delta - 0.5), gradient - 0.5, clean
        expected = geometry.advance(*given, 1 / 255, 2 / 255, "linf")
        found = step(*(x.flatten() for x in given), torch.tensor([1 / 255]), torch.tensor([2 / 255]))
        assert all(torch.equal(a, b.flatten()) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_where_nothing_compiles_the_function_itself_runs(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    double = fused(lambda x: 2 * x)
    with FakeTensorMode():
        on_gpu = torch.ones(3, device="cuda")
        with pytest.warns(UserWarning, match="no compiler"):
            assert double(on_gpu).shape == (3,)
        assert double(on_gpu).device.type == "cuda", "and says so once"

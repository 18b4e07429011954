"""What differs on a GPU: fused kernels give the CPU's bits, in few launches; resizing repeats; copies are the model."""

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_clip
from rayclip import rng
from rayclip.attacks import geometry
from rayclip.models import fast_copy
from rayclip.models.resizing import resized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def count_kernels(function) -> int:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0)


@pytest.mark.filterwarnings("error::UserWarning")  # a warning says that nothing is fused
def test_a_draw_is_one_kernel_and_has_the_cpus_bits():
    for count, shape, stream in ((64, (3, 16, 16), 3), (5, (3, 7, 5), 0), (1, (3, 8, 8), 1), (7, (1, 1, 1), 2)):
        keys = rng.sample_keys(range(count), 0, "draw")
        drawn = rng.uniform(keys.cuda(), shape, stream=stream)
        assert torch.equal(drawn.cpu(), rng.uniform(keys, shape, stream=stream))
    keys = rng.sample_keys(range(64), 0, "draw").cuda()
    assert count_kernels(lambda: rng.uniform(keys, (3, 64, 64))) <= 3


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_attacks_step_is_one_kernel_and_has_the_cpus_bits():
    for count in (6, 1):
        clean, delta, gradient = torch.rand(3, count, 3, 16, 16)
        given = 0.02 * (delta - 0.5), gradient - 0.5, clean
        expected = geometry.advance(*given, 1 / 255, 2 / 255, "linf")
        placed = [x.cuda() for x in given]
        found = geometry.advance(*placed, 1 / 255, 2 / 255, "linf")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        assert count_kernels(lambda placed=placed: geometry.advance(*placed, 1 / 255, 2 / 255, "linf")) <= 4


@pytest.mark.parametrize("how", ["antialias", "plain"])
@pytest.mark.parametrize("side", [8, 40])
def test_resizing_and_its_gradient_repeat_bit_for_bit(how, side):
    pixels = torch.rand(16, 3, side, side, device="cuda").requires_grad_()
    weights = torch.rand(16, 3, 24, 24, device="cuda")
    runs = []
    for _ in range(3):
        out = resized(pixels, 24, how)
        runs.append((out.detach(), *torch.autograd.grad((out * weights).sum(), pixels)))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    assert (runs[0][0].cpu() - resized(pixels.detach().cpu(), 24, how)).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_compiled_copy_with_graphs_is_the_model_up_to_rounding(precision):
    clip = tiny_clip().cuda().eval()
    fast = fast_copy(clip, precision, compiled=True)
    pixels = torch.rand(9, 3, 8, 8, device="cuda").requires_grad_()
    for count in (9, 4, 9):
        slopes = [torch.autograd.grad(m.encode_image(pixels[:count])[:, 0].sum(), pixels)[0] for m in (clip, fast)]
        assert F.cosine_similarity(*(slope[:count].flatten(1) for slope in slopes)).min() > 0.95
    with torch.no_grad():
        assert (fast.encode_image(pixels) - clip.encode_image(pixels)).abs().max() < 0.05

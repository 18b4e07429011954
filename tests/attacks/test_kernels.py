"""What a draw and an attack's step cost a GPU besides the model's own passes, counted by `benchmarks/kernels.py`."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels import SIDE, a_step, counted
from rayclip import rng


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_draw_writes_once_and_a_step_moves_few_volumes():
    with FakeTensorMode(allow_non_fake_inputs=True):
        keys = torch.arange(256, device="cuda")
        kernels, volumes = counted(lambda: rng.uniform(keys, (3, SIDE, SIDE)))
        assert kernels <= 2 and volumes < 1.1  # 172 and 189 operation by operation
        kernels, volumes = a_step("linf", "final")
        assert kernels <= 15 and volumes < 8.5  # 25 and 36; the small ones note which images are decided

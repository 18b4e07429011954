"""How much a batch took of a card's memory."""

import pytest
import torch

from rayclip.evaluation.batching import CudaMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(("share", "part", "fits"), [(1.0, 0.1, True), (1.0, 0.5, False), (0.25, 0.2, False)])
def test_a_batch_of_twice_the_size_fits_or_not(share, part, fits):
    device = torch.device("cuda")
    memory, total = CudaMemory(device, share), torch.cuda.mem_get_info(device)[1]
    memory.begin()
    batch = torch.empty(int(part * total), dtype=torch.uint8, device=device)
    del batch
    assert memory.has_room_for_twice() == fits
    torch.cuda.empty_cache()

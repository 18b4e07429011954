"""Images are decoded ahead of the attack, by several threads if asked for."""

import time

import pytest
import torch
from PIL import Image

from rayclip.data.digits import Digits
from rayclip.evaluation.reading import Reader
from rayclip.types import UserError


class Slow(Digits):
    """Images that take 50 ms each, of which one reader at a time is allowed."""

    def __init__(self, larger=-1):
        super().__init__("test")
        self.larger, self.is_read = larger, False

    def images(self, positions):
        assert not self.is_read, "data need not be thread-safe"
        self.is_read = True
        time.sleep(0.05 * len(positions))
        self.is_read = False
        return [Image.new("RGB", (8 + (p == self.larger), 8), (int(p), 0, 0)) for p in positions]


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_share_a_batch(threads):
    read = Reader(Slow(), "native", 8, threads=threads)
    began = time.monotonic()
    first = read(range(8), then=range(8, 11))
    took = time.monotonic() - began
    assert first[:, 0, 0, 0].tolist() == list(range(8)) and (took < 0.3) == (threads > 1)
    time.sleep(0.3)
    began = time.monotonic()
    assert torch.equal(read(range(8, 11), then=())[:, 0, 0, 0], torch.tensor([8, 9, 10]))
    assert time.monotonic() - began < 0.1, "it was read in the meantime"
    found = read.take()
    assert found.decoding > 0.5 and found.threads == threads and took - 0.1 < found.waiting < took + 0.1
    assert read.take() == (0.0, 0.0, threads)


def test_sizes_that_differ_between_threads_are_refused():
    with pytest.raises(UserError, match="differ in size"):
        Reader(Slow(larger=7), "native", 8, threads=2)(range(8), then=())

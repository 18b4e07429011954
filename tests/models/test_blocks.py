"""Blocks that are run here give what open_clip's own forward gives, and multiply frozen weights in one piece."""

import pytest
import torch
from open_clip.transformer import Transformer
from torch.utils._python_dispatch import TorchDispatchMode

from rayclip.models.blocks import run_block, run_blocks

WIDTH, HEADS, TOKENS, ROWS = 16, 2, 5, 3


def transformer(**changes):
    torch.manual_seed(0)
    return Transformer(WIDTH, 2, HEADS, **changes).eval()


def tokens(dtype):
    return torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def masks():
    causal = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
    own = causal.repeat(ROWS, 1, 1)
    own[1, 3:, 1:3] = -torch.inf
    return {"none": (None, None), "one": (causal, causal), "own": (own[:, None], own.repeat_interleave(HEADS, 0))}


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.3}], ids=str)
def test_values_and_gradients_are_those_of_the_transformer(mask, changes):
    whole, (ours, theirs) = transformer(**changes).double(), masks()[mask]
    weights = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)

    def found(run):
        whole.zero_grad()
        x = tokens(torch.float64)
        out = run(x)
        (out * weights).sum().backward()
        return [out.detach(), x.grad, *(p.grad.clone() for p in whole.parameters())]

    pairs = zip(
        found(lambda x: run_blocks(whole.resblocks, x, ours)), found(lambda x: whole(x, attn_mask=theirs)), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_few_tokens_ask_and_see_all():
    block, x = transformer().double().resblocks[0], tokens(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run_block(block, x, 2), block(x)[:, :2], rtol=0, atol=1e-12)


class Products(TorchDispatchMode):
    """Names of the matrix products within the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in ("mm", "addmm", "bmm", "baddbmm"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_frozen_weights_are_multiplied_in_one_piece():
    frozen, x = transformer().requires_grad_(False), tokens(torch.float32)
    with Products() as ours:
        torch.autograd.grad(run_blocks(frozen.resblocks, x).sum(), x)
    assert ours.seen == ["addmm"] * 8 + ["mm"] * 8, "four a block, there and back"
    with Products() as theirs:
        torch.autograd.grad(frozen(x).sum(), x)
    assert "bmm" in theirs.seen, "PyTorch does so itself now: this module is no longer needed"

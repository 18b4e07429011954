"""Forward pass of open_clip's own transformer blocks, batch first throughout.

`nn.MultiheadAttention` transposes its input to length first. The result is not contiguous, and if the weights are
frozen, as in every attack, PyTorch multiplies it by one small product per position: on a CPU this takes 2.6 times as
long as one large product, a fifth of the forward and backward pass of a ViT-B/32.

Shapes: B rows, T tokens, Q query tokens, E width of a token.
"""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def run_blocks(blocks: Iterable[nn.Module], x_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pass tokens through `blocks`, one after the other.

    Args:
        blocks: stock `ResidualAttentionBlock`s (`models.stock`), batch first.
        mask: added to the attention's scores, `(T, T)` or `(B, 1, T, T)`.
    """
    mask = None if mask is None else mask.to(x_BTE.dtype)
    for block in blocks:
        x_BTE = run_block(block, x_BTE, x_BTE.shape[1], mask)
    return x_BTE


def run_block(block: Any, x_BTE: Tensor, asking: int, mask: Tensor | None = None) -> Tensor:
    """Return a block's output for the first `asking` tokens, `(B, Q, E)`; they attend to all tokens."""
    seen_BTE = block.ln_1(x_BTE)
    x_BQE = x_BTE[:, :asking] + block.ls_1(attend(block.attn, seen_BTE, asking, mask))
    return x_BQE + block.ls_2(block.mlp(block.ln_2(x_BQE)))


def attend(attention: nn.MultiheadAttention, x_BTE: Tensor, asking: int, mask: Tensor | None = None) -> Tensor:
    """Return self-attention in which the first `asking` tokens attend to all tokens, `(B, Q, E)`."""
    weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, x_BTE.shape[2]
    if asking == x_BTE.shape[1]:
        asked, keys, values = F.linear(x_BTE, weight, bias).chunk(3, dim=2)
    else:
        asked = F.linear(x_BTE[:, :asking].contiguous(), weight[:width], bias[:width])
        keys, values = F.linear(x_BTE, weight[width:], bias[width:]).chunk(2, dim=2)
    q, k, v = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (asked, keys, values))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out_proj(found.transpose(1, 2).flatten(2))

"""Faster forward pass of a ViT with class-token pooling: its last block is computed for the class token alone.

The last block's outputs for patch tokens are never used: only the class token is pooled. It needs their keys and
values, but neither their queries nor their MLP, which is most of a block.

Patches do not overlap, so that embedding them is one matrix product. Its gradient with respect to the pixels, which
attacks need and training does not, takes a fifth of the time of a convolution's on a CPU.

Shapes: B batch, C channels, H W height and width, T tokens, E width of a token, D embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.blocks import run_block, run_blocks
from rayclip.models.stock import is_stock


def class_token_tower(model: nn.Module) -> Any:
    """Return the image tower of an open_clip model if it is a stock ViT (`models.stock`) that pools its class token,
    else None: then the model's own `encode_image` must be used."""
    return model.visual if is_stock(model, ("visual",)) else None


def encode_class_token(tower: Any, x_BCHW: Tensor) -> Tensor:
    """Return un-normalised embeddings `(B, D)` of images prepared by `Clip.tower_input`."""
    *blocks, last = tower.transformer.resblocks
    x_BTE = run_blocks(blocks, _first_tokens(tower, x_BCHW))
    class_B1E = run_block(last, x_BTE, asking=1)
    with torch.autocast(x_BTE.device.type, enabled=False):  # rounding here would pass into every cosine
        pooled_BE = tower.ln_post(class_B1E.to(tower.class_embedding.dtype))[:, 0]
        return pooled_BE if tower.proj is None else pooled_BE @ tower.proj


def _first_tokens(tower: Any, x_BCHW: Tensor) -> Tensor:
    """Return the class token and the embedded patches as input of the first block, `(B, T, E)`."""
    height, width = tower.conv1.kernel_size
    rows, columns = x_BCHW.shape[2] // height, x_BCHW.shape[3] // width
    whole = x_BCHW[:, :, : rows * height, : columns * width]  # a convolution ignores pixels beyond the last whole patch
    patches = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    weight = tower.conv1.weight.flatten(1)
    # Under autocast, too: bf16 tells fewer shades apart than 8 bits do, which would be most of a loss's error, and this
    # is a fortieth of a tower's operations
    with torch.autocast(x_BCHW.device.type, enabled=False):
        patches_BTE = F.linear(patches.flatten(3).flatten(1, 2).to(weight.dtype), weight)
    class_B1E = tower.class_embedding.expand(len(patches_BTE), 1, -1)
    x_BTE = torch.cat([class_B1E, patches_BTE], dim=1) + tower.positional_embedding
    return tower.ln_pre(tower.patch_dropout(x_BTE))

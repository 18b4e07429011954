"""A ViT that is read at its class token, whose last block works for that token alone.

What the last block makes of the patch tokens goes nowhere: only the class token is pooled. It needs their keys and
values, but neither their queries nor their way through the MLP, which is most of a block.

Shapes: B batch, T tokens, W width, D embedding.
"""

from typing import Any

from torch import Tensor, nn


def class_token_tower(visual: nn.Module) -> Any:
    """`visual` if it is a ViT of open_clip's own that pools its class token, else None."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.pool_type != "tok":
        return None
    transformer: Any = visual.transformer
    plain = transformer.batch_first and not transformer.grad_checkpointing and not visual.output_tokens
    return visual if plain and type(transformer.resblocks[-1]) is ResidualAttentionBlock else None


def encode_class_token(tower: Any, x_BCHW: Tensor) -> Tensor:
    """Un-normalised embeddings `(B, D)` of what `Clip.tower_input` makes of images."""
    *blocks, last = tower.transformer.resblocks
    x_BTW = tower._embeds(x_BCHW)
    for block in blocks:
        x_BTW = block(x_BTW)
    seen_BTW = last.ln_1(x_BTW)
    x_B1W = x_BTW[:, :1] + last.ls_1(last.attention(seen_BTW[:, :1], seen_BTW, seen_BTW))
    x_B1W = x_B1W + last.ls_2(last.mlp(last.ln_2(x_B1W)))
    pooled_BW = tower.ln_post(x_B1W)[:, 0]
    return pooled_BW if tower.proj is None else pooled_BW @ tower.proj

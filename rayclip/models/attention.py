"""Text-guided attention (TGA-ZSR): a map of where an image's patches resemble a text.

Shapes: B batch, T patches, M texts per image, D embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.clip import Clip
from rayclip.types import UserError


def patch_tower(clip: Clip) -> Any:
    """Return the model's image tower, if its patch tokens can be projected into the space of its embeddings.

    Raises:
        UserError: the tower is not open_clip's own ViT, pools by attention, or drops patches.
    """
    from open_clip.transformer import VisionTransformer  # the import takes seconds

    tower: Any = clip.model.visual
    is_plain = isinstance(tower, VisionTransformer) and tower.attn_pool is None and tower.proj is not None
    is_plain = is_plain and not clip.appends_tokens
    if not is_plain or not isinstance(tower.patch_dropout, nn.Identity):
        raise UserError(
            f"model '{clip.spec}' has no patch tokens in the space of its embeddings, which text-guided attention "
            "needs: take a ViT of open_clip's own, such as ViT-B-32, or another method."
        )
    return tower


def encode_with_patches(clip: Clip, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings of images, `(B, D)` as `encode_image`, and of their patches, `(B, T, D)`; one
    forward pass.

    A patch's embedding is its last token after the tower's final norm and projection. The forward pass is the model's
    own, whatever parts it has; a hook takes the tokens that its transformer returns.

    Args:
        pixels_BCHW: `(B, 3, H, W)` in [0, 1].

    Raises:
        UserError: as `patch_tower`, or the model's own forward pass does not use the tower's transformer exactly once.
    """
    tower, seen = patch_tower(clip), list[Tensor]()
    handle = tower.transformer.register_forward_hook(lambda _, __, tokens_BTE: seen.append(tokens_BTE))
    try:
        image_BD = clip.model.encode_image(clip.tower_input(pixels_BCHW), normalize=True)  # type: ignore[operator]
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UserError(
            f"the image tower of '{clip.spec}' was patched to go past its transformer, and text-guided attention needs "
            "the patch tokens that come out of it: use another method."
        )
    return image_BD, F.normalize(tower.ln_post(seen[0][:, 1:]) @ tower.proj, dim=-1)


def text_guided_attention(clip: Clip, patches_BTD: Tensor, text_BMD: Tensor) -> Tensor:
    """Return the attention map A of each image, flattened: `(B, image_size²)`, values in [0, 1].

    Cosines of the patches with a text, averaged over the image's M texts, scaled per image to minimum 0 and maximum 1,
    and enlarged bilinearly to the model's input size. SAFT's code averages before it scales, too; the other order would
    weight each text by how flat its map is.

    Args:
        patches_BTD, text_BMD: normalised embeddings; the texts are those of the image's true class.
    """
    wide = torch.promote_types(patches_BTD.dtype, torch.float32)
    with torch.autocast(patches_BTD.device.type, enabled=False):  # scaling would magnify bf16's rounding errors
        # A cosine is linear in the text: the cosine of the mean text is the mean of the texts' cosines
        scores_BT = (patches_BTD.to(wide) @ text_BMD.to(wide).mean(1).unsqueeze(2)).squeeze(2)
    low, high = scores_BT.amin(1, keepdim=True), scores_BT.amax(1, keepdim=True)
    scaled_BT = (scores_BT - low) / (high - low).clamp_min(torch.finfo(scores_BT.dtype).eps)
    coarse = scaled_BT.unflatten(1, patch_tower(clip).grid_size).unsqueeze(1)
    return F.interpolate(coarse, size=(clip.image_size, clip.image_size), mode="bilinear").flatten(1)

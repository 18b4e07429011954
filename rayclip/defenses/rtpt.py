"""R-TPT, robust test-time prompt tuning (Sheng et al., CVPR 2025): each image tunes the context of the class prompts on
random views of itself, and its views vote by how much they look like each other.

Shapes: B images, V views, S of them selected, K classes, N context tokens, L positions, W width of the text tower, D
embedding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.defenses.augmix import Augment, random_views
from rayclip.defenses.base import Defense
from rayclip.models import Clip, ZeroShot
from rayclip.models.exact import widened
from rayclip.models.text import causal_tower, encode_causal
from rayclip.models.zeroshot import clean_name
from rayclip.types import UserError

_TEXTS = 1024  # prompts that are tuned at a time


@dataclass(frozen=True, kw_only=True)
class RTPT(Defense):
    """The image and `count` − 1 random views of it. `steps` of AdamW on the token embeddings of the context lower the
    mean entropy of the surest views, a share `selected`. The logits are the views' weighted sum, with weights
    softmax(s / `temperature`), s the mean cosine to a view's `neighbours`.

    Prompts are `{context} {class}.`, whatever the scorer's are. An attack that changes prompts goes past the tuning.

    Attributes:
        count: V, the image itself included.
        augment: `augmix`, or `crops` alone, as the public code has it for ImageNet and its variants.
        selected: share of the views, rounded down, but at least one view.
        steps, lr: of AdamW; its weight decay is torch's 0.01.
        context: words whose embeddings are tuned.
        neighbours: nearest other views, all if there are fewer.
        temperature: of the views' weights.
    """

    name: ClassVar[str] = "rtpt"
    random: ClassVar[bool] = True
    smooth: ClassVar[bool] = True  # the views and their weights are; the tuned class weights have no derivative

    count: int = 64
    augment: Augment = "augmix"
    selected: float = 0.1
    steps: int = 1
    lr: float = 5e-3
    context: str = "a photo of a"
    neighbours: int = 20
    temperature: float = 0.01

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"rtpt:count={self.count} leaves nothing to compare: give at least 2 views.")
        if not 0 < self.selected <= 1:
            raise UserError(f"rtpt:selected={self.selected} is a share of the views: give one in (0, 1], such as 0.1.")
        if not self.context.split():
            raise UserError("rtpt:context has no words to tune: give some, such as 'a photo of a'.")

    @property
    def view_count(self) -> int:
        return self.count

    def check(self, clip: Clip) -> None:
        if causal_tower(clip.model) is None:
            raise UserError(
                f"rtpt tunes the word embeddings of CLIP's own text encoder, which '{clip.spec}' does not have: use "
                "another defence."
            )

    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        others = random_views(pixels_BCHW, keys_B, self.count - 1, self.augment)
        return torch.cat([pixels_BCHW[:, None], others], 1)

    def class_weights(self, victim: ZeroShot, image_BVD: Tensor, text_KD: Tensor) -> Tensor:
        prompts = _Prompts(victim, self.context)
        images = image_BVD.detach().split(max(1, _TEXTS // len(victim.class_names)))
        return torch.cat([self._tuned(prompts, part, victim.clip.scale) for part in images])

    def ensemble(self, victim: ZeroShot, logits_BVK: Tensor, image_BVD: Tensor) -> Tensor:
        count = image_BVD.shape[1]
        cosines = image_BVD @ image_BVD.mT - 4 * torch.eye(count, dtype=image_BVD.dtype, device=image_BVD.device)
        nearest = cosines.topk(min(self.neighbours, count - 1), dim=-1).values.mean(-1)
        return ((nearest / self.temperature).softmax(1)[..., None] * logits_BVK).sum(1)

    def _tuned(self, prompts: "_Prompts", image_BVD: Tensor, scale: Tensor) -> Tensor:
        """Return the tuned class weights of each image, `(B, K, D)`. No image's optimisation sees another's."""
        context = prompts.context_NW.expand(len(image_BVD), -1, -1).clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], lr=self.lr)
        chosen_BSD: Tensor | None = None
        with torch.enable_grad():
            for _ in range(self.steps):
                text_BKD = prompts.embed(context)
                if chosen_BSD is None:
                    entropy_BV = _entropy(scale * image_BVD @ text_BKD.detach().mT)
                    surest = entropy_BV.topk(max(1, int(self.selected * image_BVD.shape[1])), largest=False).indices
                    chosen_BSD = image_BVD.gather(1, surest[..., None].expand(-1, -1, image_BVD.shape[2]))
                loss = _entropy(scale * chosen_BSD @ text_BKD.mT).mean(1).sum()
                (context.grad,) = torch.autograd.grad(loss, context)
                optimizer.step()
        with torch.no_grad():
            return prompts.embed(context)


class _Prompts:
    """The class prompts, with a context of each image's own."""

    def __init__(self, victim: ZeroShot, context: str) -> None:
        self._tower = causal_tower(victim.clip.model)
        self._tokens_KL = victim.clip.tokenize([f"{context} {clean_name(name)}." for name in victim.class_names])
        count = victim.clip.tokenize([context]).shape[1] - 2  # without start and end mark
        with torch.no_grad():
            self._words_KLW = self._tower.token_embedding(self._tokens_KL)
        self.context_NW = self._words_KLW[0, 1 : 1 + count]

    def embed(self, context_BNW: Tensor) -> Tensor:
        """Return the normalised embeddings of all prompts with each context, `(B, K, D)`."""
        images, classes, count = len(context_BNW), len(self._tokens_KL), context_BNW.shape[1]
        words = self._words_KLW.expand(images, -1, -1, -1)
        own = context_BNW[:, None].expand(-1, classes, -1, -1)
        words_BKLW = torch.cat([words[:, :, :1], own, words[:, :, 1 + count :]], 2)
        tokens = self._tokens_KL.repeat(images, 1)
        raw = encode_causal(self._tower, tokens, words_BKLW.flatten(0, 1))
        return F.normalize(widened(raw), dim=-1).unflatten(0, (images, classes))


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

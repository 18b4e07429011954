"""Losses as pure functions. Shapes: B this worker's samples, G the global batch, K classes, D embedding."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.methods.parallel import gather, global_mean, own_rows
from rayclip.models.exact import cosine_logits, widened

Targets = Literal["diagonal", "class"]


def class_cross_entropy(image_BD: Tensor, text_KD: Tensor, labels_B: Tensor, scale: Tensor) -> Tensor:
    """Return CE(s·f(x)·T, y) of each sample, `(B,)`: the loss of FT-standard and TeCoA (TeCoA equation 3)."""
    return F.cross_entropy(cosine_logits(image_BD, text_KD, scale), labels_B, reduction="none")


def contrastive(
    image_BD: Tensor,
    text_BD: Tensor,
    labels_B: Tensor,
    scale: Tensor,
    total: int,
    targets: Targets = "diagonal",
    bias: Tensor | None = None,
) -> Tensor:
    """Return CE(image→text) + CE(text→image) inside the global batch, for each of this worker's pairs, `(B,)`.

    MMCoA equations 7 and 8. Row i of `image_BD` and row i of `text_BD` are a pair; the rows to compare with come from
    all workers.

    A model with a bias was trained by SigLIP's sigmoid loss (Zhai et al., ICCV 2023, section 3.2) instead: each image
    and each text are a question of their own, `-log σ(±(s·cos + b))`, plus for positives, summed over the texts. Its
    temperature and bias are those of that loss; a softmax over the batch would take it away from what it was trained
    for. The sum over a batch is the same from image to text and back, and counts once.

    Args:
        bias: of such a model's logits, None for a CLIP.
        targets: `diagonal` (reference code): only a pair's own partner is positive, so two images of one class are each
            other's negatives. `class` (equation 7): every pair of the same class is positive, and a row's loss is the
            mean over its positives, so that both conventions agree if no class occurs twice.
    """
    image_GD, text_GD = gather(image_BD, total), gather(text_BD, total)
    labels_G = gather(labels_B, total)
    if targets == "class":
        positive_BG = widened((labels_B[:, None] == labels_G[None, :]).to(image_BD.dtype))
    else:
        own = own_rows(total)
        positive_BG = widened(image_BD.new_zeros(len(image_BD), total))
        positive_BG[:, own].fill_diagonal_(1)
    if bias is not None:
        logits_BG = cosine_logits(image_BD, text_GD, scale) + bias
        return -F.logsigmoid((2 * positive_BG - 1) * logits_BG).sum(1)
    weights_BG = positive_BG / positive_BG.sum(1, keepdim=True)
    image_to_text = -(weights_BG * cosine_logits(image_BD, text_GD, scale).log_softmax(1)).sum(1)
    text_to_image = -(weights_BG * cosine_logits(text_BD, image_GD, scale).log_softmax(1)).sum(1)
    return image_to_text + text_to_image


def divergence(from_BK: Tensor, to_BK: Tensor) -> Tensor:
    """Return KL(softmax from ‖ softmax to) of the logits of each sample, `(B,)`."""
    log_p, log_q = from_BK.log_softmax(1), to_BK.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def weighted_sum(terms: dict[str, tuple[float, Tensor]], total: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `Σ weight · global mean` of terms `(B,)`, and the detached means (unweighted) under their names and
    `loss`."""
    means = {name: global_mean(term_B, total) for name, (_, term_B) in terms.items()}
    loss = torch.stack([weight * means[name] for name, (weight, _) in terms.items()]).sum()
    return loss, {"loss": loss.detach(), **{name: mean.detach() for name, mean in means.items()}}

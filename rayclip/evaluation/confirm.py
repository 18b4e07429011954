"""Attack a fast copy of the model, and count only successes that the fp32 model confirms.

Shapes: B batch, K classes; A the samples that are attacked again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rayclip.attacks import Adversarial, Attack, Samples
from rayclip.attacks.geometry import per_image
from rayclip.models import ZeroShot


class Confirmed(NamedTuple):
    """Adversarial examples, and their logits by the fp32 classifier that was attacked, `(B, K)`; None if it was not
    asked about them."""

    found: Adversarial
    logits_BK: Tensor | None


def run_confirmed(
    attack: Attack, exact: ZeroShot, fast: ZeroShot, samples: Samples, *, eps: float, prompts: tuple[str, ...] | None
) -> Confirmed:
    """Attack `fast`, a copy of `exact`; then attack `exact` again on the samples that fooled only `fast`.

    The verdict is the fp32 model's on the final image. A sample that left the attack early, or that a search for the
    nearest boundary (FAB) left on the boundary of `fast`, is attacked once more from the start on `exact`: none counts
    as robust because of a rounding error. Where the last iterate counts (`final`), there is no second attack.
    """
    found = attack.run(fast, samples, eps=eps, prompts=prompts)
    if not attack.stops_early:
        return Confirmed(found, None)
    labels_B = samples.labels_B
    with torch.no_grad():
        logits_BK = found.logits(exact, labels_B)
        again_B = logits_BK.argmax(1).eq(labels_B)
        again_B &= found.logits(fast, labels_B).argmax(1).ne(labels_B)
    if samples.todo_B is not None:
        again_B &= samples.todo_B
    again_A = again_B.nonzero().squeeze(1)
    if not len(again_A):
        return Confirmed(found, logits_BK)
    second = attack.run(exact, samples._replace(todo_B=again_B), eps=eps, prompts=prompts)
    texts = None
    if found.own_texts is not None and second.own_texts is not None:
        pairs = zip(again_B.tolist(), found.own_texts, second.own_texts, strict=True)
        texts = tuple(new if again else old for again, old, new in pairs)
    parts = None
    if found.part_B is not None and second.part_B is not None:
        parts = torch.where(again_B, second.part_B, found.part_B)
    with torch.no_grad():
        logits_BK[again_A] = second.rows(again_A).logits(exact, labels_B[again_A])
    both = Adversarial(
        torch.where(per_image(again_B), second.images_BCHW, found.images_BCHW),
        second.text_KD,
        torch.where(again_B, second.steps_B, found.steps_B),
        found.queries_B + second.queries_B,
        parts,
        texts,
    )
    return Confirmed(both, logits_BK)

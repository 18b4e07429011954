"""Attack a fast copy of the model, and count only successes that the fp32 model confirms.

Shapes: B batch.
"""

import torch

from rayclip.attacks import Adversarial, Attack, Samples
from rayclip.attacks.geometry import per_image
from rayclip.models import ZeroShot


def run_confirmed(
    attack: Attack, exact: ZeroShot, fast: ZeroShot, samples: Samples, *, eps: float, prompts: tuple[str, ...] | None
) -> Adversarial:
    """Attack `fast`, a copy of `exact`; then attack `exact` again on the samples that fooled only `fast`.

    The verdict is the fp32 model's on the final image. A sample that left the attack early, or that a search for the
    nearest boundary (FAB) left on the boundary of `fast`, is attacked once more from the start on `exact`: none counts
    as robust because of a rounding error. Where the last iterate counts (`final`), there is no second attack.
    """
    found = attack.run(fast, samples, eps=eps, prompts=prompts)
    if not attack.stops_early:
        return found
    labels_B = samples.labels_B
    with torch.no_grad():
        again_B = found.logits(exact, labels_B).argmax(1).eq(labels_B)
        again_B &= found.logits(fast, labels_B).argmax(1).ne(labels_B)
    if samples.todo_B is not None:
        again_B &= samples.todo_B
    if not again_B.any():
        return found
    second = attack.run(exact, samples._replace(todo_B=again_B), eps=eps, prompts=prompts)
    texts = None
    if found.own_texts is not None and second.own_texts is not None:
        pairs = zip(again_B.tolist(), found.own_texts, second.own_texts, strict=True)
        texts = tuple(new if again else old for again, old, new in pairs)
    parts = None
    if found.part_B is not None and second.part_B is not None:
        parts = torch.where(again_B, second.part_B, found.part_B)
    return Adversarial(
        torch.where(per_image(again_B), second.images_BCHW, found.images_BCHW),
        second.text_KD,
        torch.where(again_B, second.steps_B, found.steps_B),
        found.queries_B + second.queries_B,
        parts,
        texts,
    )

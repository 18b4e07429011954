"""SAFT's hallucination filter: keeps, of each class's captions, the M whose text embeddings are nearest to the class
name's.

Shapes: D embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayclip.models.clip import Clip
from rayclip.models.zeroshot import TEMPLATE, class_prompts, clean_name
from rayclip.types import UserError

# Templates that fill up classes with too few captions, in this order.
FILL_TEMPLATES = (
    TEMPLATE,
    "An image that shows a {}",
    "A close-up of a {}",
    "A photo of one {}",
    "A {} seen from some distance",
    "A bright photo of a {}",
    "A small picture of a {}",
    "A cropped photo of a {}",
    "A photo with a {} in the middle",
    "A sharp photo of a {}",
    "A dark photo of a {}",
    "A typical {}",
    "A photo of some {}",
    "A blurry photo of a {}",
    "A snapshot of a {}",
    "A detailed view of a {}",
)

_BLOCK = 4096  # texts between two reports of progress
_DIGITS = 6  # of a score: the digits of an fp32 cosine that do not depend on the batch


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A caption with its cosine to the class name, rounded to six digits; `filled` marks a filled-in template."""

    caption: str
    score: float
    filled: bool = False


def nearest_captions(
    clip: Clip,
    class_names: Sequence[str],
    captions: Sequence[Sequence[str]],
    keep: int,
    *,
    fill: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Scored]]:
    """Keep the captions of each class that are nearest to its name, best first (SAFT's hallucination filter).

    Scores are `<g(caption), g(name)>` with `g` CLIP's normalised text embedding and the bare name as `clean_name`
    writes it. Captions of equal score keep their order. Captions longer than the model's context are truncated when
    embedded.

    Args:
        captions: of each class, in the order of `class_names`, without repeats.
        keep: M, captions to keep per class.
        fill: fill up a class that has fewer with prompts from `FILL_TEMPLATES`, which come after its captions.
        progress: called from time to time with (texts embedded, texts in total).

    Returns:
        For each class `keep` captions.

    Raises:
        UserError: as `check_enough`.
    """
    check_enough(class_names, captions, keep, fill=fill)
    names = [clean_name(name) for name in class_names]
    short = [label for label, own in enumerate(captions) if len(own) < keep]
    fillers = {label: _fillers(class_names[label], captions[label], keep) for label in short}
    texts = [*names, *(text for own in captions for text in own), *(text for own in fillers.values() for text in own)]
    embedded = _embed(clip, texts, progress)

    def scored(label: int, text: str, *, filled: bool = False) -> Scored:
        cosine = float(embedded[text] @ embedded[names[label]])
        return Scored(caption=text, score=round(cosine, _DIGITS), filled=filled)

    chosen = []
    for label, own in enumerate(captions):
        ranked = sorted((scored(label, text) for text in own), key=lambda s: -s.score)  # stable: ties keep their order
        chosen.append(ranked[:keep] + [scored(label, text, filled=True) for text in fillers.get(label, [])])
    return chosen


def check_enough(class_names: Sequence[str], captions: Sequence[Sequence[str]], keep: int, *, fill: bool) -> None:
    """Raise a `UserError` that names classes with fewer than `keep` captions, or, with `fill`, with more missing than
    there are templates."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; it must be 1 or more")
    short = [label for label, own in enumerate(captions) if len(own) < keep]
    if fill:
        for label in short:
            _fillers(class_names[label], captions[label], keep)
    elif short:
        shown = ", ".join(f"'{class_names[label]}' ({len(captions[label])})" for label in short[:5])
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        raise UserError(
            f"{len(short)} of {len(class_names)} classes have fewer than {keep} captions: {shown}{more}; add captions "
            "or mend names (rayclip captions check suggests some), keep fewer, or fill up with class prompts "
            "(--fill template)."
        )


def _fillers(name: str, own: Sequence[str], keep: int) -> list[str]:
    prompts = [p for template in FILL_TEMPLATES for p in class_prompts([name], template) if p not in own]
    missing = keep - len(own)
    if missing > len(prompts):
        raise UserError(
            f"class '{name}' has {len(own)} captions and there are {len(prompts)} templates to fill up with: "
            f"keep at most {len(own) + len(prompts)}."
        )
    return prompts[:missing]


@torch.no_grad()
def _embed(clip: Clip, texts: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Tensor]:
    """Return each distinct text's normalised embedding `(D,)`."""
    different = list(dict.fromkeys(texts))
    found: dict[str, Tensor] = {}
    for start in range(0, len(different), _BLOCK):
        block = different[start : start + _BLOCK]
        found.update(zip(block, clip.embed_texts(block).float().cpu(), strict=True))
        progress(len(found), len(different))
    return found

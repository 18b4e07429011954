"""SAFT (Zhang et al. 2026, arXiv 2602.12461): semantic-aware adversarial fine-tuning, with M captions per class."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rayclip.attacks.semantic import Objective, Texts, best_texts, digest_texts, ensemble_loss, template_texts
from rayclip.methods.base import Batch
from rayclip.methods.tga_zsr import TGAZSR
from rayclip.models import Clip
from rayclip.models.captions import FILL_TEMPLATES
from rayclip.models.exact import cosine_logits
from rayclip.settings import FILLED_IN
from rayclip.types import UserError

TEMPLATES = "templates"


@dataclass(frozen=True, kw_only=True)
class SAFT(TGAZSR):
    """TGA-ZSR's three terms with CE averaged over M captions per class, on images made by the semantic-ensemble attack.
    The attention is that of the true class's captions: the mean of their cosine maps, then scaled (`models.attention`).
    Each image costs one forward pass for all captions.

    SAFT-L and SAFT-M differ in the source of the captions: a language model, or a multimodal one.

    Attributes:
        objective: of the attack, see `semantic.ensemble_loss`.
        sets: M, captions per class; the best ones are used.
        captions: table of captions as `rayclip captions filter` writes it, or `templates` to do without; it is read
            when a run is planned (`with_texts`), and workers do not need it.
        texts: the captions of each class in label order, as read from the table.
    """

    name: ClassVar[str] = "saft"

    objective: Objective = "cross_entropy"
    sets: int = 5
    captions: str = ""
    texts: Texts = field(default=(), repr=False, metadata=FILLED_IN)

    def __post_init__(self) -> None:
        if self.sets < 1:
            raise UserError(f"saft: sets={self.sets} must be at least 1.")
        if self.captions == TEMPLATES and self.sets > len(FILL_TEMPLATES):
            raise UserError(f"saft: there are {len(FILL_TEMPLATES)} templates, not {self.sets}: ask for fewer sets.")

    def captions_needed(self, bundled: str) -> str:
        if self.texts or self.captions == TEMPLATES:
            return ""
        if not (self.captions or bundled):
            raise UserError(
                "saft trains on captions of the classes: give saft:captions=FILE, a table as rayclip captions filter "
                "writes it, or saft:captions=templates to do without."
            )
        return self.captions or bundled

    def with_texts(self, texts: Sequence[Sequence[str]], class_names: Sequence[str] = (), captions: str = "") -> Self:
        """Return the method with `sets` captions of each class, the best ones."""
        table = captions or self.captions
        best = best_texts(texts, class_names, self.sets, who=self.name, captions=table)
        return replace(self, captions=table, texts=best)

    @property
    def texts_per_class(self) -> int:
        return self.sets

    def prompts(self, class_names: Sequence[str], template: str) -> list[str]:
        """Return all classes' captions of the first set, then of the second, ..."""
        texts = template_texts(class_names, self.sets) if self.captions == TEMPLATES else self.texts
        if len(texts) != len(class_names):
            raise ValueError(f"captions of {len(texts)} classes for {len(class_names)}: call with_texts")
        return [text for one_set in zip(*texts, strict=True) for text in one_set]

    def describe(self) -> dict[str, Any]:
        """Return the settings; `captions` is a hash of the texts, or `templates`."""
        shown = super().describe()
        del shown["texts"]
        return shown | ({} if self.captions == TEMPLATES else {"captions": digest_texts(self.texts)})

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        with torch.no_grad():
            text_PD = batch.texts.all()

        def objective(pixels: Tensor) -> Tensor:
            logits_BMK = cosine_logits(clip.encode_image(pixels), text_PD, clip.scale).unflatten(1, (self.sets, -1))
            return ensemble_loss(logits_BMK, batch.labels_B, self.objective)

        return self.perturb(clip, batch, objective)

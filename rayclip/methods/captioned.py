"""Base of the methods that can train on captions of the classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rayclip.attacks.semantic import Texts, best_texts, digest_texts, template_texts
from rayclip.methods.base import Method
from rayclip.models.captions import FILL_TEMPLATES
from rayclip.settings import FILLED_IN
from rayclip.types import UserError

TEMPLATES = "templates"


@dataclass(frozen=True, kw_only=True)
class CaptionedMethod(Method):
    """A method with M captions per class as its prompts.

    Attributes:
        sets: M, captions per class; the best ones are used.
        captions: table of captions as `rayclip captions filter` writes it, or `templates` to do without; it is read
            when a run is planned (`with_texts`), and workers do not need it.
        texts: the captions of each class in label order, as read from the table.
    """

    sets: int = 5
    captions: str = ""
    texts: Texts = field(default=(), repr=False, metadata=FILLED_IN)

    def __post_init__(self) -> None:
        if self.sets < 1:
            raise UserError(f"{self.name}: sets={self.sets} must be at least 1.")
        if self.captions == TEMPLATES and self.sets > len(FILL_TEMPLATES):
            raise UserError(
                f"{self.name}: there are {len(FILL_TEMPLATES)} templates, not {self.sets}: ask for fewer sets."
            )

    def captions_needed(self, bundled: str) -> str:
        return "" if self.texts or self.captions == TEMPLATES else self.captions

    def with_texts(self, texts: Sequence[Sequence[str]], class_names: Sequence[str] = (), captions: str = "") -> Self:
        """Return the method with `sets` captions of each class, the best ones."""
        table = captions or self.captions
        best = best_texts(texts, class_names, self.sets, who=self.name, captions=table)
        return replace(self, captions=table, texts=best)

    @property
    def has_captions(self) -> bool:
        return bool(self.captions or self.texts)

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
        """Return the settings; `captions` is a hash of the texts, `templates`, or empty."""
        shown = super().describe()
        del shown["texts"]
        from_table = self.has_captions and self.captions != TEMPLATES
        return shown | ({"captions": digest_texts(self.texts)} if from_table else {})

"""SAFT's semantic-ensemble attack: makes an image that is misclassified under many descriptions of each class at once.

Shapes: A samples being attacked, M caption sets, K classes, D embedding.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Adversarial, GradientAttack, Prompts, Samples
from rayclip.models import Clip, ZeroShot, class_prompts
from rayclip.models.captions import FILL_TEMPLATES
from rayclip.settings import FILLED_IN
from rayclip.types import UserError

Objective = Literal["cross_entropy", "mean_similarity"]
Texts = tuple[tuple[str, ...], ...]

# Each model's caption embeddings, for the most recent texts
_embedded: WeakKeyDictionary[Clip, tuple[Texts, Tensor]] = WeakKeyDictionary()


def ensemble_loss(logits_AMK: Tensor, labels_A: Tensor, objective: Objective) -> Tensor:
    """Return the loss that the attack maximises, `(A,)`; the logits are `s·<f(x + d), t>` for class k's caption in set
    m.

    `cross_entropy`: the mean over the sets of CE(logits, y) (SAFT's code). `mean_similarity`: minus the mean logit of
    the true class's captions (the paper's words).
    """
    sets = logits_AMK.shape[1]
    if objective == "cross_entropy":
        labels = labels_A[:, None].expand(-1, sets)
        return F.cross_entropy(logits_AMK.transpose(1, 2), labels, reduction="none").mean(1)
    own = logits_AMK.gather(2, labels_A[:, None, None].expand(-1, sets, 1))
    return -own.squeeze(2).mean(1)


def best_texts(
    texts: Sequence[Sequence[str]], class_names: Sequence[str], sets: int, *, who: str, captions: str
) -> Texts:
    """Return the first `sets` captions of each class.

    Args:
        who, captions: for the error message: whose setting `sets` is, and the table that the texts come from.

    Raises:
        UserError: a class has fewer captions.
    """
    short = [(name, own) for name, own in zip(class_names, texts, strict=True) if len(own) < sets]
    if short:
        name, own = short[0]
        raise UserError(
            f"{who}: class '{name}' has {len(own)} of {sets} captions in {captions or 'texts'}: "
            f"add captions, or use sets={max(1, min(len(own) for _, own in short))}."
        )
    return tuple(tuple(own[:sets]) for own in texts)


def template_texts(class_names: Sequence[str], sets: int) -> Texts:
    """Return stand-ins for captions: `sets` templates, filled in for each class."""
    by_set = [class_prompts(class_names, template) for template in FILL_TEMPLATES[:sets]]
    return tuple(zip(*by_set, strict=True))


def digest_texts(texts: Texts) -> str:
    """Return a hash that identifies captions."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class SemanticEnsemble(GradientAttack):
    """Semantic ensemble: maximises the loss averaged over `sets` captions per class, with one image forward pass.

    Classified, and under `first_success` stopped, by the clean class prompts: SAFT uses the attack in training, and
    evaluates with the usual template.

    Attributes:
        objective: see `ensemble_loss`.
        sets: M, captions per class; the best ones are used.
        captions: table of captions, as `rayclip captions filter` writes it, for the classes that are attacked, or a
            folder with one table per data set; an evaluation reads it before it starts. Without one, the captions are
            the first `sets` of `FILL_TEMPLATES`.
        texts: the captions of each class in label order, as read from the table, or given directly without one.
    """

    name: ClassVar[str] = "semantic"

    objective: Objective = "cross_entropy"
    sets: int = 5
    captions: str = ""
    texts: Texts = field(default=(), repr=False, metadata=FILLED_IN)

    def __post_init__(self) -> None:
        if not self.captions and not self.texts and self.sets > len(FILL_TEMPLATES):
            raise UserError(
                f"semantic:sets={self.sets}: without captions there are {len(FILL_TEMPLATES)} templates: "
                "ask for fewer sets or give captions=FILE."
            )

    def captions_needed(self, bundled: str) -> str:
        return "" if self.texts else self.captions

    def with_texts(self, texts: Sequence[Sequence[str]], class_names: Sequence[str] = (), captions: str = "") -> Self:
        """Return the attack with `sets` captions of each class, the best ones."""
        return replace(self, texts=best_texts(texts, class_names, self.sets, who=self.name, captions=self.captions))

    def describe(self) -> dict[str, Any]:
        """Return the settings; `captions` is a hash of the texts, or `templates`."""
        if not self.texts:
            self._need_texts()
            return super().describe() | {"captions": "templates"}
        return super().describe() | {"captions": digest_texts(self.texts)}

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        text_MKD = self._embed(victim)

        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            features, labels = victim.embed(pixels, index), samples.labels_B[index]
            logits_AMK = torch.stack([victim.logits(features, text_KD) for text_KD in text_MKD], 1)
            return ensemble_loss(logits_AMK, labels, self.objective), victim.logits(features).argmax(1) != labels

        images, steps, queries = self.ascend(forward, samples, eps=eps, constant=victim.deterministic)
        return Adversarial(images, None, steps, queries)

    def _embed(self, victim: ZeroShot) -> Tensor:
        """Return the class weights of every caption set, `(M, K, D)`; embedded once per victim, not once per batch."""
        texts = self.more_texts(victim.class_names)
        if victim.clip not in _embedded or _embedded[victim.clip][0] != texts:
            by_set = [text for own in zip(*texts, strict=True) for text in own]
            with torch.no_grad():
                _embedded[victim.clip] = texts, victim.clip.embed_texts(by_set).view(self.sets, len(texts), -1)
        return _embedded[victim.clip][1]

    def more_texts(self, class_names: Sequence[str]) -> Texts:
        """Return `sets` captions of each class."""
        if self.texts:
            if len(self.texts) != len(class_names):
                raise ValueError(f"captions of {len(self.texts)} classes for a victim of {len(class_names)}")
            return self.texts
        self._need_texts()
        return template_texts(class_names, self.sets)

    def _need_texts(self) -> None:
        if self.captions:
            raise ValueError("the table of captions has not been read: call with_texts")

"""BERT-Attack on class prompts (Li et al. 2020), as MMCoA uses it: replace the word that matters most.

The attack sees the prompt and the text encoder only, never an image; it runs once per (data set, model). All prompts
and all their maskings go through the text encoder together.

Shapes: P prompts, M masked or replaced sentences of all prompts in a row, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from rayclip.attacks.base import Adversarial, Attack, Prompts, Samples
from rayclip.attacks.substitutes import STOP_WORDS, TOKEN_TABLE, Offset, SubstituteSource, substitute_source
from rayclip.models import Clip, ZeroShot

UNKNOWN = "[UNK]"


class TextChange(NamedTuple):
    """An adversarial prompt and how it came about. `changes` are (position, old word, new word)."""

    prompt: str
    changes: tuple[tuple[int, str, str], ...]


def divergence(clean_D: Tensor, other_D: Tensor) -> Tensor:
    """KL(softmax clean ‖ softmax other) over the embedding axis, in float64: `(..., D)`, `(..., D)` -> `(...)`."""
    p, q = clean_D.double().log_softmax(-1), other_D.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def bert_attack(clip: Clip, prompts: Sequence[str], source: SubstituteSource, *, changes: int = 1) -> list[TextChange]:
    """Attack every prompt at once.

    1. Importance of a word: the divergence when `[UNK]` stands in its place.
    2. For the most important word that is no stop word and has substitutes, try them all.
    3. Take the one with the largest divergence from the clean prompt; go on until `changes` words are changed.
    """
    with torch.autocast(clip.device.type, enabled=False):  # divergences are small: half precision would blur them
        return _bert_attack(clip, prompts, source, changes)


def _bert_attack(clip: Clip, prompts: Sequence[str], source: SubstituteSource, changes: int) -> list[TextChange]:
    words = [prompt.lower().split() for prompt in prompts]
    clean_PD = clip.embed_texts([" ".join(w) for w in words])
    candidates = source.candidates(words)

    masked = [(p, i) for p, sentence in enumerate(words) for i in range(len(sentence))]
    importance_M = _divergences(clip, clean_PD, [(p, _with(words[p], i, UNKNOWN)) for p, i in masked])
    order: list[list[int]] = [[] for _ in words]
    for m in importance_M.argsort(descending=True, stable=True).tolist():
        p, i = masked[m]
        if words[p][i] not in STOP_WORDS and candidates[p][i]:
            order[p].append(i)

    current = [list(sentence) for sentence in words]
    changed: list[list[tuple[int, str, str]]] = [[] for _ in words]
    for turn in range(changes):
        trials = [
            (p, order[p][turn], new)
            for p in range(len(words))
            if turn < len(order[p])
            for new in candidates[p][order[p][turn]]
        ]
        gains_M = _divergences(clip, clean_PD, [(p, _with(current[p], i, new)) for p, i, new in trials]).tolist()
        best: dict[int, int] = {}
        for m, (p, _, _) in enumerate(trials):
            if p not in best or gains_M[m] > gains_M[best[p]]:
                best[p] = m
        for p, m in best.items():
            _, i, new = trials[m]
            changed[p].append((i, current[p][i], new))
            current[p][i] = new
    return [TextChange(" ".join(sentence), tuple(c)) for sentence, c in zip(current, changed, strict=True)]


def _with(sentence: list[str], position: int, word: str) -> str:
    return " ".join([*sentence[:position], word, *sentence[position + 1 :]])


def _divergences(clip: Clip, clean_PD: Tensor, sentences: list[tuple[int, str]]) -> Tensor:
    """How far each sentence is from the clean prompt it came from. `(M,)` float64 on the CPU."""
    if not sentences:
        return torch.zeros(0, dtype=torch.float64)
    owner = torch.tensor([p for p, _ in sentences], device=clean_PD.device)
    return divergence(clean_PD[owner], clip.embed_texts([s for _, s in sentences])).cpu()


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """BERT-Attack's settings.

    Attributes:
        substitutes: `clip-table` (the nearest whole words in CLIP's own token table; no download), or a masked
            language model: a hub name such as `bert-base-uncased`, or a folder.
        k: substitutes looked at per position.
        changes: words changed per prompt.
        threshold: masked LM only: smallest raw logit of a substitute (0 is off).
        offset: masked LM only: `correct`, or `reference`, which reads one position early as MMCoA's code does.
    """

    substitutes: str = "default"
    k: int = 10
    changes: int = 1
    threshold: float = 0.3
    offset: Offset = "correct"

    def with_substitutes(self, substitutes: str) -> Self:
        return replace(self, substitutes=substitutes)

    def source(self, clip: Clip) -> SubstituteSource:
        return substitute_source(clip, self.substitutes, k=self.k, threshold=self.threshold, offset=self.offset)

    def attack(self, clip: Clip, prompts: Sequence[str]) -> list[TextChange]:
        return bert_attack(clip, prompts, self.source(clip), changes=self.changes)

    def describe_text(self) -> dict[str, Any]:
        """The settings that count: the token table has neither threshold nor offset."""
        unused = ("threshold", "offset") if self.substitutes == TOKEN_TABLE else ()
        return {f.name: getattr(self, f.name) for f in fields(TextSettings) if f.name not in unused}


@dataclass(frozen=True, kw_only=True)
class TextAttack(TextSettings, Attack):
    """What attacks with adversarial class prompts share."""

    def describe(self) -> dict[str, Any]:
        rest = {k: v for k, v in super().describe().items() if k not in {f.name for f in fields(TextSettings)}}
        return rest | self.describe_text()

    def describe_prepared(self) -> dict[str, Any]:
        return self.describe_text()

    def prepare(self, victim: ZeroShot) -> tuple[str, ...]:
        return tuple(change.prompt for change in self.attack(victim.clip, victim.prompts))


@dataclass(frozen=True, kw_only=True)
class BertAttack(TextAttack):
    """Clean images against adversarial class prompts."""

    name: ClassVar[str] = "bert"
    needs_eps: ClassVar[bool] = False

    def run(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        assert prompts is not None, "call prepare first"
        return Adversarial.untouched(samples.images_BCHW, victim.embed_prompts(prompts))

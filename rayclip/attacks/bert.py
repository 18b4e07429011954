"""BERT-Attack (Li et al. 2020) as MMCoA uses it, on class prompts and on free captions: it replaces the most important
words.

The attack depends on the text and the text encoder only, never on an image; on class prompts it runs once per (data
set, model). All texts and all their masked versions go through the text encoder together.

Words are taken in lower case and punctuation marks are words of their own, as in CLIP's tokenizer; only words with a
letter or a digit are ever replaced. `offset=reference` follows the public code instead:
`substitutes.ReferenceMaskedLM`.

Shapes: P prompts, M masked or replaced sentences of all prompts in a row, D embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from rayclip.attacks.base import Attack, Prompts, TextOnlyAttack
from rayclip.attacks.substitutes import TOKEN_TABLE, Offset, SubstituteSource, substitute_source
from rayclip.models import Clip, ZeroShot

UNKNOWN = "[UNK]"
DEFAULT = "default"  # stands for the source of substitutes that fits the data
_TOGETHER = 1024  # prompts processed at once, to bound memory


class TextChange(NamedTuple):
    """An adversarial prompt and its changes, each (position, old word, new word)."""

    prompt: str
    changes: tuple[tuple[int, str, str], ...]


class Ranked(NamedTuple):
    """A prompt with its words ranked for replacement.

    Attributes:
        words: as the source's rules split the prompt.
        order: the positions that may change, most important first.
        options: for each word, its possible substitutes; if the rules let a word stay, the word itself comes first.
        clean_D: the unchanged prompt's normalised embedding.
    """

    words: list[str]
    order: list[int]
    options: list[list[str]]
    clean_D: Tensor


# (owners_M: the prompt that each sentence came from, embeddings_MD, normalised) -> gain_M; the largest wins
Gain = Callable[[Tensor, Tensor], Tensor]
# sentences -> normalised embeddings_MD
Embed = Callable[[tuple[str, ...]], Tensor]


def divergence(clean_D: Tensor, other_D: Tensor) -> Tensor:
    """Return KL(softmax clean ‖ softmax other) over the embedding axis, in float64: `(..., D)`, `(..., D)` ->
    `(...)`."""
    p, q = clean_D.double().log_softmax(-1), other_D.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def bert_attack(clip: Clip, prompts: Sequence[str], source: SubstituteSource, *, changes: int = 1) -> list[TextChange]:
    """Attack any number of texts, long ones included, in batches.

    1. Importance of a word: the divergence if `[UNK]` replaces it. Computed only where it affects the result.
    2. For the most important word that is no stop word and has substitutes, try them all.
    3. Take the one with the largest divergence from the clean prompt; repeat until `changes` words are changed.
    """
    found: list[TextChange] = []
    for start in range(0, len(prompts), _TOGETHER):
        ranked = rank_words(clip, prompts[start : start + _TOGETHER], source)
        clean_PD = torch.stack([r.clean_D for r in ranked])
        embed, gain = partial(embed_as_read, clip, source), partial(_divergence_from_clean, clean_PD)
        found += change_words(ranked, embed, gain, changes)
    return found


def _divergence_from_clean(clean_PD: Tensor, owners_M: Tensor, new_MD: Tensor) -> Tensor:
    """Return BERT-Attack's gain: each sentence's divergence from the clean prompt that it came from."""
    return divergence(clean_PD[owners_M], new_MD)


@torch.no_grad()
def rank_words(clip: Clip, prompts: Sequence[str], source: SubstituteSource) -> list[Ranked]:
    """Rank the words of each prompt by importance (step 1 of the attack) and collect their substitutes for step 2."""
    rules = source.rules
    words = [rules.split(prompt) for prompt in prompts]
    options = source.candidates(words)
    may_change = [
        [i for i, word in enumerate(w) if rules.may_change(word) and o[i]] for w, o in zip(words, options, strict=True)
    ]
    if rules.may_stay:
        options = [[[word, *new] for word, new in zip(w, o, strict=True)] for w, o in zip(words, options, strict=True)]
    masked = [(p, i) for p, places in enumerate(may_change) if len(places) > 1 for i in places]
    sentences = [" ".join(w) for w in words] + [_with(words[p], i, UNKNOWN) for p, i in masked]
    clean_PD, masked_MD = embed_as_read(clip, source, sentences).split([len(words), len(masked)])
    owners = _on_device([p for p, _ in masked], clean_PD)
    importance = dict(zip(masked, divergence(clean_PD[owners], masked_MD).tolist(), strict=True))
    order = [sorted(places, key=lambda i: -importance.get((p, i), 0.0)) for p, places in enumerate(may_change)]
    return [Ranked(*one) for one in zip(words, order, options, clean_PD, strict=True)]


@torch.no_grad()
def change_words(ranked: Sequence[Ranked], embed: Embed, gain: Gain, changes: int) -> list[TextChange]:
    """Run steps 2 and 3: word by word, choose the substitute with the largest `gain` for each prompt."""
    current = [list(r.words) for r in ranked]
    changed: list[list[tuple[int, str, str]]] = [[] for _ in ranked]
    for turn in range(max((len(r.order) for r in ranked), default=0)):
        trials = [
            (p, r.order[turn], new)
            for p, r in enumerate(ranked)
            if turn < len(r.order) and len(changed[p]) < changes
            for new in r.options[r.order[turn]]
        ]
        if not trials:
            break
        new_MD = embed(tuple(_with(current[p], i, new) for p, i, new in trials))
        gains_M = gain(_on_device([p for p, _, _ in trials], new_MD), new_MD).tolist()
        best: dict[int, int] = {}
        for m, (p, _, _) in enumerate(trials):
            if p not in best or gains_M[m] > gains_M[best[p]]:
                best[p] = m
        for p, m in best.items():
            _, i, new = trials[m]
            if new != current[p][i]:
                changed[p].append((i, current[p][i], new))
                current[p][i] = new
    return [TextChange(" ".join(sentence), tuple(c)) for sentence, c in zip(current, changed, strict=True)]


def _with(sentence: list[str], position: int, word: str) -> str:
    return " ".join([*sentence[:position], word, *sentence[position + 1 :]])


def _on_device(owners: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(owners, dtype=torch.int64).to(like.device, non_blocking=True)


def embed_as_read(clip: Clip, source: SubstituteSource, sentences: Sequence[str]) -> Tensor:
    """Return normalised embeddings, `(M, D)`."""
    with torch.autocast(clip.device.type, enabled=False):  # divergences are too small for half precision
        return clip.embed_texts(source.as_read(sentences))


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """BERT-Attack's settings.

    Attributes:
        substitutes: `clip-table` (the nearest whole words in CLIP's own token table; no download), or a masked language
            model: a hub name such as `bert-base-uncased`, or a folder.
        k: substitutes considered per position.
        changes: words changed per prompt.
        threshold: masked LM only: smallest raw logit of a substitute (0 is off).
        offset: masked LM only: `correct`, or `reference`, which reproduces MMCoA's code and finds the same words:
            predictions are read one position early, there is no [SEP], words are split at blanks, stop words are
            compared case-sensitively ("This" is none, and is often the word replaced), and substitutes need not be
            words.
        combinations: masked LM only: combinations of word pieces considered for a word of several pieces.
        max_length: masked LM only: word pieces read of a text, [CLS] and [SEP] included; words beyond stay unchanged.
    """

    substitutes: str = DEFAULT
    k: int = 10
    changes: int = 1
    threshold: float = 0.3
    offset: Offset = "correct"
    combinations: int = 24
    max_length: int = 30

    def with_substitutes(self, substitutes: str) -> Self:
        return replace(self, substitutes=substitutes)

    def source(self, clip: Clip) -> SubstituteSource:
        return substitute_source(
            clip,
            self.substitutes,
            k=self.k,
            threshold=self.threshold,
            offset=self.offset,
            combinations=self.combinations,
            max_length=self.max_length,
        )

    def attack(self, clip: Clip, prompts: Sequence[str]) -> list[TextChange]:
        return bert_attack(clip, prompts, self.source(clip), changes=self.changes)

    def count_cut(self, clip: Clip, prompts: Sequence[str]) -> int:
        """Return how many of the texts are too long for the source of substitutes; what it does not read stays
        unchanged."""
        source = self.source(clip)
        return source.cut([source.rules.split(prompt) for prompt in dict.fromkeys(prompts)])

    def describe_text(self) -> dict[str, Any]:
        """Return the settings that affect the result; with the token table, those of the masked LM do not."""
        unused = ("threshold", "offset", "combinations", "max_length") if self.substitutes == TOKEN_TABLE else ()
        return {f.name: getattr(self, f.name) for f in fields(TextSettings) if f.name not in unused}


@dataclass(frozen=True, kw_only=True)
class TextAttack(TextSettings, Attack):
    """Base of the attacks with adversarial texts: class prompts, or captions if images are the classes."""

    for_pairs: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        rest = {k: v for k, v in super().describe().items() if k not in {f.name for f in fields(TextSettings)}}
        return rest | self.describe_text()

    def describe_prepared(self) -> dict[str, Any] | None:
        return self.describe_text()

    def with_default_substitutes(self, substitutes: str) -> Self:
        return self.with_substitutes(substitutes) if self.substitutes == DEFAULT else self

    def check(self, clip: Clip) -> None:
        self.source(clip)

    def prepare(self, victim: ZeroShot) -> Prompts:
        return tuple(change.prompt for change in self.attack(victim.clip, victim.prompts))


@dataclass(frozen=True, kw_only=True)
class BertAttack(TextAttack, TextOnlyAttack):
    """Clean images against adversarial class prompts (captions)."""

    name: ClassVar[str] = "bert"

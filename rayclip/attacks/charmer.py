"""Charmer (Abad Rocamora et al., ICML 2024, arXiv 2405.04346) on class prompts and on captions: it changes single
characters.

A text of L characters has 2L + 1 places: 2i lies before its character i (for an insertion), 2i + 1 is that character
(for a replacement or a deletion). Charmer tries a blank at every place, and then every character at the places where
the blank moved the embedding farthest. Like BERT-Attack it depends on the text and the text encoder only.

Texts with the same tokens (CLIP reads neither upper case nor a second blank) are one candidate: a text only changes
where the model reads it, and rounding cannot choose among equals. The public code never inserts an underscore and skips
the last candidate of each pass; here all are tried.

Shapes: P texts, M candidates for all of them in a row, D embedding.
"""

import itertools
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rayclip.attacks.base import Prompts, TextOnlyAttack
from rayclip.attacks.bert import divergence
from rayclip.attacks.feature import Objective, feature_distance
from rayclip.attacks.words import split_words
from rayclip.models import Clip, ZeroShot

DELETION, BLANK = "", " "
CHARACTERS = (DELETION, *string.ascii_lowercase, BLANK, *string.ascii_uppercase, *string.digits, *string.punctuation)
_TOGETHER = 16  # texts attacked at once: some 30,000 candidates
_AT_ONCE = 4096  # candidates whose distances are computed at once, to bound memory


def edit(text: str, place: int, character: str) -> str:
    """Return a text with a character at one of its 2L + 1 places; the character that is there already is deleted."""
    at, replaces = divmod(place, 2)
    if replaces and text[at] == character:
        character = DELETION
    return text[:at] + character + text[at + replaces :]


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for edits that move the embeddings of P texts away from their anchors.

    Attributes:
        anchor_PD: normalised embeddings for `kl`, un-normalised ones for `squared`.
        objective: the distance: `kl` as in BERT-Attack (`bert.divergence`), or `squared` (`feature_distance`).
        words: if given, an edit must leave a text fewer different words among these (`known_words`).
    """

    clip: Clip
    anchor_PD: Tensor
    objective: Objective
    words: frozenset[str] | None = None

    def step(
        self, texts: Sequence[str], places: Sequence[Sequence[int]], n: int, characters: Sequence[Sequence[str]]
    ) -> list[str]:
        """Return the texts, each after the edit that moves it farthest, or as it is if none moves it.

        Args:
            places: the places of each text to try with a blank; the best `n` of them are tried with all characters.
            characters: the characters to try for each text.
        """
        blanks = [self._edits(text, own, (BLANK,)) for text, own in zip(texts, places, strict=True)]
        best = [
            [own[i] for i in sorted(sorted(range(len(own)), key=lambda i: -gains[i])[:n])]
            for own, gains in zip(places, self.gains(blanks), strict=True)
        ]
        trials = [
            [text, *self._edits(text, own, chosen)] for text, own, chosen in zip(texts, best, characters, strict=True)
        ]
        found = zip(trials, self.gains(trials), strict=True)
        return [own[max(range(len(own)), key=gains.__getitem__)] for own, gains in found]

    @torch.no_grad()
    def gains(self, trials: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the distance of each text's candidates from its anchor."""
        flat = list(itertools.chain.from_iterable(trials))
        rows = self.clip.token_rows(flat).numpy()
        _, first, places = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        with torch.autocast(self.clip.device.type, enabled=False):  # distances are too small for half precision
            each = self.clip.embed_texts([flat[i] for i in first], normalize=self.objective == "kl")
            owners = np.repeat(np.arange(len(trials)), [len(own) for own in trials])
            index = torch.from_numpy(np.stack((owners, places.reshape(-1)))).to(each.device, non_blocking=True)
            found = [self._distance(self.anchor_PD[p], each[i]) for p, i in index.split(_AT_ONCE, 1)]
        values = iter(torch.cat(found).tolist())
        return [list(itertools.islice(values, len(own))) for own in trials]

    def _distance(self, anchor_MD: Tensor, other_MD: Tensor) -> Tensor:
        if self.objective == "kl":
            return divergence(anchor_MD, other_MD)
        return feature_distance(anchor_MD.double(), other_MD.double(), "squared")

    def _edits(self, text: str, places: Iterable[int], characters: Iterable[str]) -> list[str]:
        """Return the text after each edit, or as it is if that is not allowed."""
        edited = [edit(text, place, character) for place, character in itertools.product(places, characters)]
        if self.words is None:
            return edited
        fewer = len(self.words.intersection(split_words(text)))
        return [new if len(self.words.intersection(split_words(new))) < fewer else text for new in edited]


def known_words(clip: Clip, constrain: bool) -> frozenset[str] | None:
    """Return the words that edits must not add to, if they are constrained: the whole words in CLIP's own vocabulary.

    Raises:
        UserError: the model has another tokenizer.
    """
    return frozenset(word for word, _ in clip.whole_words) if constrain else None


@dataclass(frozen=True, kw_only=True)
class Charmer(TextOnlyAttack):
    """Clean images against class prompts (captions) with changed characters, those that move the embedding farthest.

    Attributes:
        k: edits, one after the other: the Levenshtein distance is at most k.
        n: places at which every character is tried; from 2L + 1 on, the attack is exhaustive for k=1.
        objective: `kl` of the normalised embeddings, as BERT-Attack has it here, or LEAF's: the `squared` distance of
            the un-normalised ones.
        constrain: an edit must leave a text fewer different English words than before, as LEAF's code has it where it
            constrains, so that none is put in another's place. The published code's list of words is NLTK's; here
            they are CLIP's own vocabulary's.
    """

    name: ClassVar[str] = "charmer"

    k: int = 1
    n: int = 20
    objective: Objective = "kl"
    constrain: bool = False

    def check(self, clip: Clip) -> None:
        known_words(clip, self.constrain)

    def prepare(self, victim: ZeroShot) -> Prompts:
        return tuple(self.attack(victim.clip, victim.prompts))

    def attack(self, clip: Clip, texts: Sequence[str]) -> list[str]:
        """Return the adversarial texts of any number of texts."""
        words, found = known_words(clip, self.constrain), list[str]()
        for start in range(0, len(texts), _TOGETHER):
            part = list(texts[start : start + _TOGETHER])
            with torch.no_grad():
                anchor_PD = clip.embed_texts(part, normalize=self.objective == "kl")
            search = Search(clip=clip, anchor_PD=anchor_PD, objective=self.objective, words=words)
            for _ in range(self.k):
                part = search.step(part, [range(2 * len(t) + 1) for t in part], self.n, [CHARACTERS] * len(part))
            found += part
        return found

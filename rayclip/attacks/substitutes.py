"""Sources of substitute words for BERT-Attack: a masked language model, or CLIP's own token table."""

import itertools
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.words import CORRECT, REFERENCE, STOP_WORDS, WordRules
from rayclip.models import Clip
from rayclip.models.loading import silence
from rayclip.models.remembered import Remembered
from rayclip.types import UserError

TOKEN_TABLE = "clip-table"
Offset = Literal["correct", "reference"]
_REMEMBERED = 50_000  # words, sentences or texts per source
_token_tables: WeakKeyDictionary[Clip, dict[tuple[torch.device, int], "TokenTable"]] = WeakKeyDictionary()


class SubstituteSource(Protocol):
    rules: ClassVar[WordRules]

    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        """Return, for each sentence (a list of words) and each of its words, the possible substitutes, best first.

        They never include the word itself, a stop word or a piece of a word.
        """

    def as_read(self, texts: Sequence[str]) -> Sequence[str]:
        """Return the texts as CLIP reads them while the attack searches for words."""

    def cut(self, sentences: Sequence[Sequence[str]]) -> int:
        """Return how many of the sentences are too long to be read to their end."""


class TokenTable:
    """The nearest whole words by cosine in CLIP's own token-embedding table. Needs no download.

    A word of several BPE pieces is represented by the mean of their rows.
    """

    rules: ClassVar[WordRules] = CORRECT

    def __init__(self, clip: Clip, k: int) -> None:
        self._clip, self._k = weakref.proxy(clip), k  # the model's sources are kept beside it
        pairs = [(word, row) for word, row in clip.whole_words if word not in STOP_WORDS]
        self._words = [word for word, _ in pairs]
        self._rows = torch.tensor([row for _, row in pairs]).to(clip.device, non_blocking=True)
        self._pieces = Remembered(self._split, _REMEMBERED)

    def as_read(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def cut(self, sentences: Sequence[Sequence[str]]) -> int:
        """Return 0: each word is looked up by itself."""
        return 0

    @torch.no_grad()
    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        distinct = sorted({word for sentence in sentences for word in sentence if word not in STOP_WORDS})
        found: dict[str, list[str]] = {word: [] for word in STOP_WORDS}
        if distinct:
            table = F.normalize(self._clip.token_table.detach().float(), dim=1)
            pieces = self._pieces(distinct)
            most = max(map(len, pieces))
            rows = torch.tensor([own + [-1] * (most - len(own)) for own in pieces])
            rows = rows.to(table.device, non_blocking=True)[:, :, None]
            queries = F.normalize((table[rows[:, :, 0]] * (rows >= 0)).sum(1) / (rows >= 0).sum(1), dim=1)
            nearest = (queries @ table[self._rows].T).topk(min(self._k + 1, len(self._words))).indices
            for word, row in zip(distinct, nearest.tolist(), strict=True):
                found[word] = [w for w in (self._words[i] for i in row) if w != word][: self._k]
        return [[found[word] for word in sentence] for sentence in sentences]

    def _split(self, words: Sequence[str]) -> list[list[int]]:
        """Return each word's rows of the table, without the start and end marks."""
        rows = self._clip.token_rows(words).tolist()
        # The end mark has the highest id, and padding follows it. A word without any piece gets row 0.
        return [row[1 : row.index(max(row))] or [0] for row in rows]


class MaskedLM:
    """A masked language model's predictions at the word's own position; the sentence itself is not masked.

    A word of one piece: the top k predictions whose raw logit reaches `threshold`, without pieces of words. A word of
    several: combinations of the top 4 predictions of each piece, the first `combinations` of them, ranked by the
    model's perplexity on the combination alone. Words beyond `max_length` pieces, [CLS] and [SEP] included, have no
    substitutes.
    """

    rules: ClassVar[WordRules] = CORRECT

    PIECES, TOP = 12, 4
    _FIRST = 1  # position of the first word's prediction, after [CLS]
    _TOGETHER = 64  # sentences per forward pass: 30 positions of 30,522 logits each are 230 MB

    def __init__(
        self,
        model: str,
        device: torch.device,
        *,
        k: int,
        threshold: float,
        combinations: int = 24,
        max_length: int = 30,
    ) -> None:
        self._tokenizer, self._model = _load_masked_lm(model, str(device))
        self._k, self._threshold, self._combinations = k, threshold, combinations
        longest = min(max_length, self._model.config.max_position_embeddings)
        self._room = max(0, longest - len(self._framed([])))  # pieces read of a text
        self._remembered = Remembered(self._find, _REMEMBERED)
        self._decoded = Remembered(self._decode, _REMEMBERED)

    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        return self._remembered([tuple(sentence) for sentence in sentences])

    @torch.no_grad()
    def _find(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        """Return `candidates` of distinct sentences; they never change."""
        found = [[list[str]() for _ in sentence] for sentence in sentences]
        several: dict[tuple[int, int], list[list[int]]] = {}
        for start in range(0, len(sentences), self._TOGETHER):
            several |= self._read(sentences, range(start, min(start + self._TOGETHER, len(sentences))), found)
        for (s, w), options in self._rank(several).items():
            found[s][w] = options
        return [
            [
                [o for o in dict.fromkeys(options) if o != word and o not in self.rules.stop_words]
                for word, options in zip(sentence, row, strict=True)
            ]
            for sentence, row in zip(sentences, found, strict=True)
        ]

    def as_read(self, texts: Sequence[str]) -> Sequence[str]:
        return self._decoded(texts)

    def _decode(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def cut(self, sentences: Sequence[Sequence[str]]) -> int:
        """Return how many of the sentences are too long to be read to their end."""
        lengths = (sum(len(self._tokenizer.tokenize(w)) or 1 for w in sentence) for sentence in sentences)
        return sum(length > self._room for length in lengths)

    def _read(
        self, sentences: Sequence[Sequence[str]], part: range, found: list[list[list[str]]]
    ) -> dict[tuple[int, int], list[list[int]]]:
        """Run one forward pass. Fills in `found` for words of one piece; returns the combinations of each (sentence,
        word) with several."""
        pieces = [[self._pieces(word) for word in sentences[s]] for s in part]
        rows = [[p for word in s for p in word][: self._room] for s in pieces]
        logits, tops = self._predict([self._framed(row) for row in rows])
        several: dict[tuple[int, int], list[list[int]]] = {}
        for b, s in enumerate(part):
            end = 0
            for w, (word, parts) in enumerate(zip(sentences[s], pieces[b], strict=True)):
                start, end = end, end + len(parts)
                if not self._fits(start, end):
                    break
                at = slice(start + self._FIRST, end + self._FIRST)
                places = tops[b, at]
                if word in self.rules.stop_words or not len(places):
                    continue
                if len(places) == 1:
                    found[s][w] = self._single(logits[b, at][0], places[0])
                else:
                    choices = places[: self.PIECES, : self._choices].tolist()
                    every = itertools.islice(itertools.product(*choices), self._combinations)
                    several[s, w] = [list(row) for row in every]
        return several

    def _pieces(self, word: str) -> list[str]:
        return self._tokenizer.tokenize(word) or [self._tokenizer.unk_token]

    def _framed(self, pieces: list[str]) -> list[str]:
        return [self._tokenizer.cls_token, *pieces, self._tokenizer.sep_token]

    def _fits(self, start: int, end: int) -> bool:
        """Return whether a word whose pieces run from `start` to before `end` is read."""
        return end <= self._room

    @property
    def _choices(self) -> int:
        """Number of predictions per piece that are combined."""
        return self.TOP

    def _is_word(self, token: str) -> bool:
        """Return whether a prediction may be a substitute: no ##piece, punctuation or special token."""
        return token.isalpha()

    def _are_words(self, text: str) -> bool:
        """Return the same for a combination."""
        return text.isascii() and text.replace(" ", "").isalpha()

    def _predict(self, rows: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Return the top-k logits and ids at every position, `(B, L, k)` each, on the CPU."""
        longest = max(len(row) for row in rows)
        ids = [self._tokenizer.convert_tokens_to_ids(row) for row in rows]
        pad = self._tokenizer.pad_token_id
        batch = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=self._model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self._model.device)
        found = self._model(input_ids=batch, attention_mask=mask).logits.topk(max(self._k, self.TOP), -1)
        return found.values.cpu(), found.indices.cpu()

    def _single(self, logits_k: Tensor, ids_k: Tensor) -> list[str]:
        words = []
        tokens = self._tokenizer.convert_ids_to_tokens(ids_k[: self._k].tolist())
        for logit, token in zip(logits_k[: self._k].tolist(), tokens, strict=True):
            if self._threshold and logit < self._threshold:
                break
            if self._is_word(token):
                words.append(token)
        return words

    def _rank(self, several: dict[tuple[int, int], list[list[int]]]) -> dict[tuple[int, int], list[str]]:
        """Return each word's combinations as texts, lowest perplexity first; combinations of equal length share forward
        passes."""
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for row in dict.fromkeys(tuple(row) for rows in several.values() for row in rows):
            by_length.setdefault(len(row), []).append(row)
        surprise: dict[tuple[int, ...], float] = {}
        for length, rows in by_length.items():
            together = self._TOGETHER * self._room // length
            for start in range(0, len(rows), together):
                part = rows[start : start + together]
                ids = torch.tensor(part, device=self._model.device)
                logits = self._model(input_ids=ids).logits
                loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape).mean(1)
                surprise |= dict(zip(part, loss.tolist(), strict=True))
        return {
            at: [
                text
                for row in sorted(rows, key=lambda row: surprise[tuple(row)])
                if self._are_words(text := self._text(row))
            ]
            for at, rows in several.items()
        }

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens(ids))


class ReferenceMaskedLM(MaskedLM):
    """Reproduction of MMCoA's `BertAttack`, which is taken from Co-Attack's: it finds the same words.

    - The model reads `[CLS] X` without `[SEP]`, and the predictions are taken one position early, as if there were no
      [CLS]: a word is replaced by what the model expects for the word before it.
    - A word that is cut in two by `max_length` keeps the predictions that are left.
    - Any prediction without `##` may be a substitute, punctuation, [unused] and special tokens too.
    - CLIP reads the text as the language model's tokenizer decodes it: in lower case, without accents, cut.
    """

    rules: ClassVar[WordRules] = REFERENCE
    _FIRST = 0

    def _decode(self, texts: Sequence[str]) -> Sequence[str]:
        tokenizer = self._tokenizer
        pieces = [tokenizer.tokenize(text)[: self._room] for text in texts]
        ids = [tokenizer.convert_tokens_to_ids(row) for row in pieces]
        read = [tokenizer.decode(row, clean_up_tokenization_spaces=True) if row else "" for row in ids]
        for special in (tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token):
            read = [text.replace(special, "") for text in read]
        return [text.strip() for text in read]

    def _pieces(self, word: str) -> list[str]:
        return self._tokenizer.tokenize(word)

    def _framed(self, pieces: list[str]) -> list[str]:
        return [self._tokenizer.cls_token, *pieces]

    def _fits(self, start: int, end: int) -> bool:
        return start < self._room

    @property
    def _choices(self) -> int:
        return min(self.TOP, self._k)

    def _is_word(self, token: str) -> bool:
        return "##" not in token

    def _are_words(self, text: str) -> bool:
        return "##" not in text

    def _text(self, ids: list[int]) -> str:
        return " ".join(self._tokenizer.convert_ids_to_tokens(ids)).replace(" ##", "").strip()


@lru_cache(maxsize=2)
def _load_masked_lm(name: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with silence():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForMaskedLM.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"masked language model '{name}' could not be loaded (no such folder, or the hub is out of "
            f"reach): give a folder that holds one, or use substitutes={TOKEN_TABLE}."
        ) from error
    return tokenizer, model.to(device).eval().requires_grad_(False)


def substitute_source(clip: Clip, name: str, *, k: int, offset: Offset, **settings: Any) -> SubstituteSource:
    """Return the source that a protocol names: `clip-table`, or a masked language model's hub name or folder.

    Args:
        settings: of `MaskedLM`.
    """
    if name == TOKEN_TABLE:
        kept = _token_tables.setdefault(clip, {})
        if (clip.device, k) not in kept:
            kept[clip.device, k] = TokenTable(clip, k)
        return kept[clip.device, k]
    return _masked_lm(name, clip.device, offset, k=k, **settings)


@lru_cache(maxsize=2)
def _masked_lm(name: str, device: torch.device, offset: Offset, **settings: Any) -> MaskedLM:
    kind = {"correct": MaskedLM, "reference": ReferenceMaskedLM}[offset]
    return kind(name, device, **settings)

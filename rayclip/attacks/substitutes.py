"""Where BERT-Attack finds words to put in: a masked language model, or CLIP's own token table."""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.models import Clip
from rayclip.models.clip import silence
from rayclip.types import UserError

TOKEN_TABLE = "clip-table"
Offset = Literal["correct", "reference"]

# English function words: replacing them, or putting them in, changes grammar rather than meaning.
STOP_WORDS = frozenset(
    """
    a about above across after again against all almost along already also although am among an and another any anyone
    anything are around as at away back be became because been before behind being below beside between beyond both but
    by can cannot could did do does doing down during each either else enough even ever every everyone everything for
    from had has have having he hence her here hers herself him himself his how however i if in indeed instead into is
    it its itself just least less may me meanwhile might mine more moreover most mostly much must my myself neither
    never nevertheless no nobody none nor not nothing now nowhere of off often on once only onto or other others
    otherwise our ours ourselves out over own per perhaps quite rather really same shall she should since so some
    somehow someone something sometimes somewhere still such than that the their theirs them themselves then there
    therefore these they this those though through throughout thus to together too toward towards under unless until
    up upon us very via was we well were what whatever when whenever where wherever whether which while who whoever
    whole whom whose why will with within without would yet you your yours yourself yourselves
    """.split()
)


class SubstituteSource(Protocol):
    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        """For each sentence (a list of lower-case words) and each of its words, the words that may stand there.

        Never the word itself, a stop word or a piece of a word; best first.
        """

    def cut(self, sentences: Sequence[Sequence[str]]) -> int:
        """How many of the sentences are not read to their end."""


class TokenTable:
    """The nearest whole words by cosine in CLIP's own token-embedding table. Needs no download.

    A word of several BPE pieces stands at the mean of their rows.
    """

    def __init__(self, clip: Clip, k: int) -> None:
        self._clip, self._k = clip, k
        pairs = [(word, row) for word, row in clip.whole_words if word not in STOP_WORDS]
        self._words = [word for word, _ in pairs]
        self._rows = torch.tensor([row for _, row in pairs], device=clip.device)

    def cut(self, sentences: Sequence[Sequence[str]]) -> int:
        """None: each word is looked up by itself."""
        return 0

    @torch.no_grad()
    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        distinct = sorted({word for sentence in sentences for word in sentence if word not in STOP_WORDS})
        found: dict[str, list[str]] = {word: [] for word in STOP_WORDS}
        if distinct:
            table = F.normalize(self._clip.token_table.detach().float(), dim=1)
            queries = F.normalize(torch.stack([table[rows].mean(0) for rows in self._pieces(distinct)]), dim=1)
            nearest = (queries @ table[self._rows].T).topk(min(self._k + 1, len(self._words))).indices
            for word, row in zip(distinct, nearest.tolist(), strict=True):
                found[word] = [w for w in (self._words[i] for i in row) if w != word][: self._k]
        return [[found[word] for word in sentence] for sentence in sentences]

    def _pieces(self, words: Sequence[str]) -> list[list[int]]:
        """Each word's rows of the table, without the marks of start and end."""
        rows = self._clip.tokenize(words).tolist()
        # The end mark has the highest id, and padding follows it. A word of no piece at all stands at row 0.
        return [row[1 : row.index(max(row))] or [0] for row in rows]


class MaskedLM:
    """A masked language model's predictions at the word's own position; the sentence itself is not masked.

    A word of one piece: the top k predictions whose raw logit reaches `threshold`, pieces of words dropped. A word of
    several: combinations of the top 4 predictions of each piece, the first `combinations` of them, ranked by the
    model's perplexity on the combination alone. Words beyond `max_length` pieces, [CLS] and [SEP] counted, have none.
    """

    PIECES, TOP = 12, 4
    _TOGETHER = 64  # sentences a forward: 30 positions of 30,522 logits each are 230 MB

    def __init__(
        self,
        model: str,
        device: torch.device,
        *,
        k: int,
        threshold: float,
        offset: Offset,
        combinations: int = 24,
        max_length: int = 30,
    ) -> None:
        self._tokenizer, self._model = _load_masked_lm(model, str(device))
        self._k, self._threshold, self._combinations = k, threshold, combinations
        self._room = max(0, min(max_length, self._model.config.max_position_embeddings) - 2)
        # The word after [CLS] is at position 1. MMCoA's code forgets [CLS] and reads the predictions one place early.
        self._first = {"correct": 1, "reference": 0}[offset]

    @torch.no_grad()
    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        found = [[list[str]() for _ in sentence] for sentence in sentences]
        several: dict[tuple[int, int], list[list[int]]] = {}
        for start in range(0, len(sentences), self._TOGETHER):
            several |= self._read(sentences, range(start, min(start + self._TOGETHER, len(sentences))), found)
        for (s, w), options in self._rank(several).items():
            found[s][w] = options
        return [
            [
                [o for o in dict.fromkeys(options) if o != word and o not in STOP_WORDS]
                for word, options in zip(sentence, row, strict=True)
            ]
            for sentence, row in zip(sentences, found, strict=True)
        ]

    def cut(self, sentences: Sequence[Sequence[str]]) -> int:
        """How many of the sentences are not read to their end."""
        lengths = (sum(len(self._tokenizer.tokenize(w)) or 1 for w in sentence) for sentence in sentences)
        return sum(length > self._room for length in lengths)

    def _read(
        self, sentences: Sequence[Sequence[str]], part: range, found: list[list[list[str]]]
    ) -> dict[tuple[int, int], list[list[int]]]:
        """One forward. Fills in the words of one piece; returns the combinations for (sentence, word) of several."""
        pieces = [[self._tokenizer.tokenize(w) or [self._tokenizer.unk_token] for w in sentences[s]] for s in part]
        rows = [[p for word in s for p in word][: self._room] for s in pieces]
        logits, tops = self._predict([[self._tokenizer.cls_token, *row, self._tokenizer.sep_token] for row in rows])
        several: dict[tuple[int, int], list[list[int]]] = {}
        for b, s in enumerate(part):
            end = 0
            for w, (word, parts) in enumerate(zip(sentences[s], pieces[b], strict=True)):
                at, end = end + self._first, end + len(parts)
                if end > self._room:
                    break
                if word in STOP_WORDS:
                    continue
                if len(parts) == 1:
                    found[s][w] = self._single(logits[b, at], tops[b, at])
                else:
                    choices = tops[b, at : end + self._first][: self.PIECES, : self.TOP].tolist()
                    every = itertools.islice(itertools.product(*choices), self._combinations)
                    several[s, w] = [list(row) for row in every]
        return several

    def _predict(self, rows: list[list[str]]) -> tuple[Tensor, Tensor]:
        """The top-k logits and ids at every position, `(B, L, k)` each, on the CPU."""
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
            if token.isalpha():  # drops ##pieces, punctuation and special tokens
                words.append(token)
        return words

    def _rank(self, several: dict[tuple[int, int], list[list[int]]]) -> dict[tuple[int, int], list[str]]:
        """Each word's combinations as texts, the least surprising first; those of one length share their forwards."""
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
                if (text := self._text(row)).isascii() and text.replace(" ", "").isalpha()
            ]
            for at, rows in several.items()
        }

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens(ids))


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


def substitute_source(clip: Clip, name: str, *, k: int, **settings: Any) -> SubstituteSource:
    """The source that a protocol names: `clip-table`, or a masked language model's hub name or folder.

    Args:
        settings: of `MaskedLM`.
    """
    return TokenTable(clip, k) if name == TOKEN_TABLE else MaskedLM(name, clip.device, k=k, **settings)

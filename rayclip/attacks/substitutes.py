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


class TokenTable:
    """The nearest whole words by cosine in CLIP's own token-embedding table. Needs no download.

    A word of several BPE pieces stands at the mean of their rows.
    """

    def __init__(self, clip: Clip, k: int) -> None:
        self._clip, self._k = clip, k
        pairs = [(word, row) for word, row in clip.whole_words if word not in STOP_WORDS]
        self._words = [word for word, _ in pairs]
        self._rows = torch.tensor([row for _, row in pairs], device=clip.device)

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
    several: combinations of the top 4 predictions of each piece, the first 24 of them, ranked by the model's
    perplexity on the combination alone.
    """

    PIECES, TOP, COMBINATIONS, MAX_LENGTH = 12, 4, 24, 30

    def __init__(self, model: str, device: torch.device, *, k: int, threshold: float, offset: Offset) -> None:
        self._tokenizer, self._model = _load_masked_lm(model, str(device))
        self._k, self._threshold = k, threshold
        # The word after [CLS] is at position 1. MMCoA's code forgets [CLS] and reads the predictions one place early.
        self._first = {"correct": 1, "reference": 0}[offset]

    @torch.no_grad()
    def candidates(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        return [
            result for start in range(0, len(sentences), 256) for result in self._chunk(sentences[start : start + 256])
        ]

    def _chunk(self, sentences: Sequence[Sequence[str]]) -> list[list[list[str]]]:
        pieces = [[self._tokenizer.tokenize(word) or [self._tokenizer.unk_token] for word in s] for s in sentences]
        room = self.MAX_LENGTH - 2
        rows = [[p for word in s for p in word][:room] for s in pieces]
        logits, tops = self._predict([[self._tokenizer.cls_token, *row, self._tokenizer.sep_token] for row in rows])
        results: list[list[list[str]]] = []
        for b, sentence in enumerate(sentences):
            position = 0
            found: list[list[str]] = []
            for word, parts in zip(sentence, pieces[b], strict=True):
                end = position + len(parts)
                if end > room or word in STOP_WORDS:
                    found.append([])
                else:
                    at = slice(position + self._first, end + self._first)
                    options = (
                        self._single(logits[b, at][0], tops[b, at][0])
                        if len(parts) == 1
                        else self._combined(tops[b, at])
                    )
                    found.append([o for o in dict.fromkeys(options) if o != word and o not in STOP_WORDS])
                position = end
            results.append(found)
        return results

    def _predict(self, rows: list[list[str]]) -> tuple[Tensor, Tensor]:
        """The top-k logits and ids at every position, `(B, L, k)` each."""
        longest = max(len(row) for row in rows)
        ids = [self._tokenizer.convert_tokens_to_ids(row) for row in rows]
        pad = self._tokenizer.pad_token_id
        batch = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=self._model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self._model.device)
        return self._model(input_ids=batch, attention_mask=mask).logits.topk(self._k, -1)

    def _single(self, logits_k: Tensor, ids_k: Tensor) -> list[str]:
        words = []
        for logit, token in zip(logits_k.tolist(), self._tokenizer.convert_ids_to_tokens(ids_k.tolist()), strict=True):
            if self._threshold and logit < self._threshold:
                break
            if token.isalpha():  # drops ##pieces, punctuation and special tokens
                words.append(token)
        return words

    def _combined(self, ids_Lk: Tensor) -> list[str]:
        choices = ids_Lk[: self.PIECES, : self.TOP].tolist()
        combinations = torch.tensor(list(itertools.islice(itertools.product(*choices), self.COMBINATIONS)))
        combinations = combinations.to(self._model.device)
        logits = self._model(input_ids=combinations).logits
        surprise = F.cross_entropy(logits.flatten(0, 1), combinations.flatten(), reduction="none")
        order = surprise.view(combinations.shape).mean(1).argsort(stable=True)
        texts = [
            self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens(row))
            for row in combinations[order].tolist()
        ]
        return [text for text in texts if text.isascii() and text.replace(" ", "").isalpha()]


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


def substitute_source(clip: Clip, name: str, *, k: int, threshold: float, offset: Offset) -> SubstituteSource:
    """The source that a protocol names: `clip-table`, or a masked language model's hub name or folder."""
    if name == TOKEN_TABLE:
        return TokenTable(clip, k)
    return MaskedLM(name, clip.device, k=k, threshold=threshold, offset=offset)

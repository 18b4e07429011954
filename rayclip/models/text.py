"""Forward pass of a causal text tower, run only as far as its texts reach.

In CLIP's text tower a token sees only those before it, and the text's embedding is read at its end mark: nothing behind
the longest text's end mark has any effect. "This is a photo of a cat" ends at the ninth of 77 positions. For the same
reason texts that begin alike can share their beginning: the prompts of all classes, or a prompt and its substitutes,
are packed into one row as one beginning and many ends that do not see each other.

Shapes: B texts, R rows, L positions, W width, D embedding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayclip.models.blocks import run_blocks
from rayclip.models.stock import is_stock


def causal_tower(model: nn.Module) -> Any:
    """Return the module that holds an open_clip model's text tower if that is stock (`models.stock`), causal and read
    at an end mark, else None: then the model's own `encode_text` must be used, with rows of full length.

    None for towers of transformers, SigLIP's (not causal), CoCa's (read at a token appended after the padding).
    """
    parts = ("text",) if hasattr(model, "text") else ("token_embedding", "transformer", "ln_final", "text_projection")
    if not is_stock(model, parts):
        return None
    tower: Any = getattr(model, "text", model)
    return tower if tower.attn_mask is not None and _pooling(tower)[0] in ("argmax", "eos") else None


def end_marks(tower: Any, tokens_BL: Tensor) -> Tensor:
    """Return the position at which a text's embedding is read, `(B,)`: its highest token, or its first `eos`."""
    kind, eos = _pooling(tower)
    return (tokens_BL if kind == "argmax" else tokens_BL.eq(eos).int()).argmax(1)


def encode_causal(tower: Any, tokens_BL: Tensor, words_BLW: Tensor | None = None) -> Tensor:
    """Return un-normalised embeddings `(B, D)` of token rows that reach at least to the last end mark.

    Args:
        words_BLW: embeddings that replace the tokens' own.
    """
    length = tokens_BL.shape[1]
    x_BLW = tower.token_embedding(tokens_BL) if words_BLW is None else words_BLW
    x_BLW = x_BLW + tower.positional_embedding[:length]
    x_BLW = run_blocks(tower.transformer.resblocks, x_BLW, tower.attn_mask[:length, :length])
    return _project(tower, x_BLW[torch.arange(len(tokens_BL), device=x_BLW.device), end_marks(tower, tokens_BL)])


class Packed(NamedTuple):
    """Texts that share rows. All tensors but `texts_B` are int64 and may be moved to a device.

    Attributes:
        texts_B: indices of the texts.
        tokens_RL: each row a beginning, the ends of its texts one after the other, and padding.
        positions_RL: a token's position in its own text.
        parts_RL: 0 for the beginning, 1, 2, ... for the ends, -1 for the padding.
        marks_B2: row and column of each text's end mark.
    """

    texts_B: list[int]
    tokens_RL: Tensor
    positions_RL: Tensor
    parts_RL: Tensor
    marks_B2: Tensor

    def to(self, device: torch.device) -> "Packed":
        tokens, positions, parts, marks = (tensor.to(device) for tensor in self[1:])
        return Packed(self.texts_B, tokens, positions, parts, marks)


def pack(texts: Sequence[list[int]], longest: int, rows: int) -> list[Packed]:
    """Return batches of up to `rows` rows of about the same length, none over `longest` unless a text is.

    Args:
        texts: each text's tokens up to its end mark.
    """
    shared: list[tuple[int, list[int]]] = []  # for each row: the length of its beginning, and its texts
    width = 0
    for t in sorted(range(len(texts)), key=lambda t: texts[t]):
        if shared:
            begin, members = shared[-1]
            common = min(begin, _alike(texts[members[0]], texts[t]), len(texts[t]) - 1)
            # Shortening the beginning repeats the rest in every end: worth it if that is less than the beginning itself
            repeated = (begin - common) * len(members) if len(members) > 1 else 0
            longer = width + repeated + len(texts[t]) - common
            if repeated < common and longer <= longest:
                shared[-1], width = (common, [*members, t]), longer
                continue
        shared.append((len(texts[t]) - 1, [t]))
        width = len(texts[t])
    shared.sort(key=lambda row: sum(len(texts[t]) - row[0] for t in row[1]) + row[0])
    return [_batch(texts, shared[i : i + rows]) for i in range(0, len(shared), rows)]


def _batch(texts: Sequence[list[int]], shared: Sequence[tuple[int, list[int]]]) -> Packed:
    columns: list[list[list[int]]] = [[], [], []]  # tokens, positions, parts
    members_B, marks = [], []
    for row, (begin, members) in enumerate(shared):
        tokens, positions, parts = texts[members[0]][:begin], list(range(begin)), [0] * begin
        for part, t in enumerate(members, start=1):
            end = texts[t][begin:]
            tokens, positions = tokens + end, positions + list(range(begin, begin + len(end)))
            parts += [part] * len(end)
            members_B.append(t)
            marks.append((row, len(tokens) - 1))
        for column, values in zip(columns, (tokens, positions, parts), strict=True):
            column.append(values)
    length = max(map(len, columns[0]))
    tokens_RL, positions_RL, parts_RL = (
        torch.tensor([values + [filler] * (length - len(values)) for values in column])
        for column, filler in zip(columns, (0, 0, -1), strict=True)
    )
    return Packed(members_B, tokens_RL, positions_RL, parts_RL, torch.tensor(marks))


def _alike(one: list[int], other: list[int]) -> int:
    """Return how many tokens the beginnings of two texts have in common."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def encode_packed(tower: Any, packed: Packed) -> Tensor:
    """Return un-normalised embeddings of `packed.texts_B`, `(B, D)`."""
    texts_B, tokens_RL, positions_RL, parts_RL, marks_B2 = packed
    x_RLW = tower.token_embedding(tokens_RL) + tower.positional_embedding[positions_RL]
    length = tokens_RL.shape[1]
    mask = tower.attn_mask[:length, :length]
    if len(texts_B) > len(tokens_RL):
        unseen_RLL = (parts_RL[:, None, :] != parts_RL[:, :, None]) & (parts_RL[:, None, :] != 0)
        mask = mask.masked_fill(unseen_RLL, -torch.inf)[:, None]
    x_RLW = run_blocks(tower.transformer.resblocks, x_RLW, mask)
    return _project(tower, x_RLW[marks_B2[:, 0], marks_B2[:, 1]])


def _project(tower: Any, x_BW: Tensor) -> Tensor:
    projection, x_BW = tower.text_projection, tower.ln_final(x_BW)
    if projection is None:
        return x_BW
    return projection(x_BW) if isinstance(projection, nn.Linear) else x_BW @ projection


def _pooling(tower: Any) -> tuple[str, int]:
    """Return `argmax` or another way of reading the embedding, and the end mark's token id if it is found by its id."""
    if hasattr(tower, "text_pool_type"):
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id

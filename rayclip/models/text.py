"""Forward pass of a causal text tower, run only as far as its texts reach.

In CLIP's text tower a token sees only those before it, and the text's embedding is read at its end mark: nothing behind
the longest text's end mark has any effect. "This is a photo of a cat" ends at the ninth of 77 positions. For the same
reason texts that begin alike can share their beginning: the prompts of all classes, or a prompt and its substitutes,
are packed into one row as one beginning and many ends that do not see each other.

Shapes: B texts, R rows, L positions, W width, D embedding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
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
    """Texts that share rows.

    Attributes:
        texts_B: indices of the texts.
        rows_3RL: int64. First each row's tokens: a beginning, the ends of its texts one after the other, and padding.
            Then each token's position in its own text. Then its part: 0 for the beginning, 1, 2, ... for the ends, -1
            for the padding.
        marks_B2: row and column of each text's end mark.
    """

    texts_B: np.ndarray
    rows_3RL: Tensor
    marks_B2: Tensor

    def to(self, device: torch.device) -> "Packed":
        rows, marks = (tensor.to(device, non_blocking=True) for tensor in self[1:])
        return Packed(self.texts_B, rows, marks)


def pack(tokens_TL: np.ndarray, ends_T: np.ndarray, longest: int, rows: int) -> list[Packed]:
    """Return batches of up to `rows` rows of about the same length, none over `longest` unless a text is.

    Args:
        tokens_TL: the texts' token rows, tokens not negative.
        ends_T: number of tokens of each text up to and including its end mark.
    """
    tokens_TL = tokens_TL[:, : ends_T.max()]
    tokens_TL = np.where(np.arange(tokens_TL.shape[1]) < ends_T[:, None], tokens_TL, -1)
    order_T = np.lexsort(tokens_TL.T[::-1])
    tokens_TL, ends_T = tokens_TL[order_T], ends_T[order_T]
    differ = tokens_TL[1:] != tokens_TL[:-1]
    alike = np.where(differ.any(1), differ.argmax(1), tokens_TL.shape[1])  # tokens that neighbours have in common
    firsts, begins = list[int](), list[int]()  # of each row: its first text, and the length of its beginning
    begin = width = 0
    for t, (length, common) in enumerate(zip(ends_T.tolist(), [0, *alike.tolist()], strict=True)):
        common = min(begin, common, length - 1)
        if firsts:
            # Shortening the beginning repeats the rest in every end: worth it if that is less than the beginning itself
            repeated = (begin - common) * (t - firsts[-1]) if t - firsts[-1] > 1 else 0
            longer = width + repeated + length - common
            if repeated < common and longer <= longest:
                begins[-1] = begin = common
                width = longer
                continue
        firsts.append(t)
        begins.append(length - 1)
        begin, width = length - 1, length
    firsts_R, begins_R = np.array(firsts), np.array(begins)
    row_T = np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(ends_T)]))
    widths_R = begins_R + np.add.reduceat(ends_T - begins_R[row_T], firsts_R)
    shortest_first = np.argsort(widths_R, kind="stable")
    batches = (shortest_first[i : i + rows] for i in range(0, len(shortest_first), rows))
    members = np.split(np.arange(len(ends_T)), firsts[1:])
    return [
        _batch(order_T, tokens_TL, ends_T, begins_R[chosen], widths_R[chosen], [members[r] for r in chosen])
        for chosen in batches
    ]


def _batch(
    order_T: np.ndarray,
    tokens_TL: np.ndarray,
    ends_T: np.ndarray,
    begins_R: np.ndarray,
    widths_R: np.ndarray,
    members: Sequence[np.ndarray],
) -> Packed:
    """Lay out a batch's rows, whose texts are `members`."""
    counts_R, texts_B = np.array([len(own) for own in members]), np.concatenate(members)
    row_B = np.repeat(np.arange(len(members)), counts_R)
    begin_B = begins_R[row_B]
    end_B = ends_T[texts_B] - begin_B  # tokens of each end
    place_B = _places(counts_R)
    before_B = end_B.cumsum() - end_B
    column_B = begin_B + before_B - before_B[place_B == 0][row_B]
    rows_3RL = np.zeros((3, len(members), widths_R.max()), dtype=np.int64)
    rows_3RL[2] = -1
    for lengths, row, column, text, position, part in (
        (begins_R, np.arange(len(members)), 0 * begins_R, [own[0] for own in members], 0 * begins_R, 0 * begins_R),
        (end_B, row_B, column_B, texts_B, begin_B, place_B + 1),
    ):
        owner, step = np.repeat(np.arange(len(lengths)), lengths), _places(lengths)
        at = position[owner] + step
        where = row[owner], column[owner] + step
        rows_3RL[0][where] = tokens_TL[np.asarray(text)[owner], at]
        rows_3RL[1][where], rows_3RL[2][where] = at, part[owner]
    marks_B2 = np.stack((row_B, column_B + end_B - 1), 1)
    return Packed(order_T[texts_B], torch.from_numpy(rows_3RL), torch.from_numpy(marks_B2))


def _places(counts: np.ndarray) -> np.ndarray:
    """Return `0 .. count - 1` for each count, in a row."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def encode_packed(tower: Any, packed: Packed) -> Tensor:
    """Return un-normalised embeddings of `packed.texts_B`, `(B, D)`."""
    texts_B, (tokens_RL, positions_RL, parts_RL), marks_B2 = packed.texts_B, packed.rows_3RL, packed.marks_B2
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

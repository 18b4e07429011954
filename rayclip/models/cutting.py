"""Finds texts that are longer than a text encoder reads.

Shapes: T texts, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

_MARKS = 3  # tokens at most that a tokenizer adds to a text: start, end, class


def find_cut(tokenizer: Any, texts: Sequence[str], room: int) -> list[str]:
    """Return the distinct texts that are longer than `room` tokens, in their order.

    A text fits if tokenizing it with twice the room gives the same tokens plus padding. This uses open_clip's
    tokenizers only by calling them, as each has its own padding and its own marks around a text.

    Args:
        room: tokens of a text that the encoder reads, marks included.
    """
    # A token covers a byte of the text or more, so most texts need no second check
    long = [text for text in dict.fromkeys(texts) if len(text) + _MARKS > room or not text.isascii()]
    if not long:
        return []
    padding = tokenizer([""], context_length=2 * room).mode().values
    short_TL = tokenizer(long, context_length=room)
    longer_TL = tokenizer(long, context_length=2 * room).sort(1).values
    filled_TL = torch.cat([short_TL, padding[:, None].expand(len(long), room)], 1).sort(1).values
    return [text for text, fits in zip(long, (longer_TL == filled_TL).all(1).tolist(), strict=True) if not fits]

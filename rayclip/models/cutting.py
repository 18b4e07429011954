"""Which texts a text encoder does not read to their end.

Shapes: T texts, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

_MARKS = 3  # tokens at most that a tokenizer adds to a text: start, end, class


def find_cut(tokenizer: Any, texts: Sequence[str], room: int) -> list[str]:
    """The different texts that are longer than `room` tokens, in their order.

    A text fits if twice the room holds the same tokens and padding besides. Nothing else is asked of a tokenizer of
    open_clip's than what it is called for: where its padding stands, and which marks it puts around a text, is its own.

    Args:
        room: tokens of a text that the encoder reads, marks included.
    """
    # A token is a byte of the text or more, so that most texts need no second look
    long = [text for text in dict.fromkeys(texts) if len(text) + _MARKS > room or not text.isascii()]
    if not long:
        return []
    padding = tokenizer([""], context_length=2 * room).mode().values
    short_TL = tokenizer(long, context_length=room)
    longer_TL = tokenizer(long, context_length=2 * room).sort(1).values
    filled_TL = torch.cat([short_TL, padding[:, None].expand(len(long), room)], 1).sort(1).values
    return [text for text, fits in zip(long, (longer_TL == filled_TL).all(1).tolist(), strict=True) if not fits]

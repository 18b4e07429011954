"""Learned tokens in several blocks of both towers of a frozen CLIP, joined by linear maps (MaPLe, FAP).

Shapes: B batch, N tokens, J blocks that get tokens of their own, T positions, W width of the text tower, E width of the
image tower.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.clip import Clip
from rayclip.models.exact import widened
from rayclip.models.prompts import Prompted, WithContext, entrance, token_width
from rayclip.types import UserError

CONTEXT = "a photo of a"  # each word is one token


class BlockTokens(NamedTuple):
    """The tokens of one block: of the text tower, `(N, W)`, and of the image tower, `(N, E)`."""

    text_NW: Tensor
    image_NE: Tensor


class WithCoupledTokens(Prompted):
    """N tokens in each of the first J blocks of both towers (Khattak et al., CVPR 2023; Zhou et al., NeurIPS 2024).

    The text tower has them in place of the first N words of "a photo of a CLASS", the image tower after its patches,
    without a position. The first block's are learned as words and mapped to the image tower. The further blocks' are
    learned in the image tower and mapped to the text tower; they replace what the block before has made of its own.

    `learned` is flat: the words, `(N, W)`, with the weight and bias of their map, then for each further block its
    image tokens, `(N, E)`, with theirs. Its length tells N and J.
    """

    kind = "coupled"
    template = f"{CONTEXT} {{}}"
    appends_tokens = True
    enters_blocks = True

    @classmethod
    def begin(cls, base: Clip, tokens: int, depth: int, seed: int) -> Self:
        """Return the words' own embeddings, image tokens from N(0, 0.02²), and maps as `nn.Linear` begins them, those
        of the further blocks alike.

        Args:
            tokens: N, 1 to 4, for the words of "a photo of a".
            depth: J, but at most the blocks of the shallower tower.
        """
        most, width, wide = _towers(base)
        if not 1 <= tokens <= len(CONTEXT.split()):
            raise UserError(f"{tokens} tokens cannot take the place of the words '{CONTEXT}': give 1 to 4.")
        generator = torch.Generator().manual_seed(seed)
        words_NW = base.token_table[base.tokenize([CONTEXT])[0, 1 : 1 + tokens]].detach().float().cpu()
        parts, further = [words_NW, *_linear(width, wide, generator)], _linear(wide, width, generator)
        for _ in range(min(depth, most) - 1):
            parts += [0.02 * torch.randn(tokens, wide, generator=generator), *further]
        return cls(base, torch.cat([part.flatten() for part in parts]))

    def __init__(self, base: Clip, learned: Tensor) -> None:
        super().__init__(base, learned)
        self._count, self._maps = _layouts(base)[len(learned)]

    @classmethod
    def shape(cls, base: Clip, count: int) -> tuple[int, ...]:
        known = _layouts(base)
        return (count if count in known else min(known),)

    def blocks(self) -> list[BlockTokens]:
        """Return the tokens of the first J blocks."""
        count = self._count
        lengths = [length for own, other in self._maps for length in (count * own, own * other, other)]
        parts, pairs = iter(self.learned.split(lengths)), []
        for own, other in self._maps:
            learned = next(parts).view(count, own)
            pairs.append((learned, F.linear(learned, next(parts).view(other, own), next(parts))))
        return [BlockTokens(*pairs[0]), *(BlockTokens(mapped, learned) for learned, mapped in pairs[1:])]

    def encode_image(self, pixels_BCHW: Tensor, *, normalize: bool = True) -> Tensor:
        if 0 < self._chunk < len(pixels_BCHW):
            return self._by_chunk(WithCoupledTokens.encode_image, pixels_BCHW, normalize)
        first, *further = (block.image_NE for block in self.blocks())

        def append(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (torch.cat([inputs[0], _for_rows(first, inputs[0])], 1),)

        handle = entrance(self).register_forward_pre_hook(append)
        try:
            with _entered(_blocks(self.model.visual), further, -len(first)):
                raw_BD = super().encode_image(pixels_BCHW, normalize=False)
        finally:
            handle.remove()
        return F.normalize(widened(raw_BD), dim=-1) if normalize else raw_BD

    def encode_text(self, tokens_BL: Tensor, *, normalize: bool = True) -> Tensor:
        if 0 < self._chunk < len(tokens_BL):
            return self._by_chunk(WithCoupledTokens.encode_text, tokens_BL, normalize)
        first, *further = (block.text_NW for block in self.blocks())
        tower = self.text_tower
        handle = tower.token_embedding.register_forward_hook(lambda _, __, words_BLW: _put(words_BLW, first, 1))
        try:
            with _entered(_blocks(tower.transformer), further, 1):
                raw_BD = super().encode_text(tokens_BL, normalize=False)
        finally:
            handle.remove()
        return F.normalize(widened(raw_BD), dim=-1) if normalize else raw_BD

    def embed_texts(self, texts: Sequence[str], *, chunk: int = 256, normalize: bool = True) -> Tensor:
        """Return the same as `Clip.embed_texts`, with each text in a row of its own."""
        rows = self.tokenize(texts).split(chunk)
        return torch.cat([self.encode_text(part, normalize=normalize) for part in rows])


def _for_rows(tokens_NE: Tensor, x_BTE: Tensor) -> Tensor:
    return tokens_NE.to(x_BTE.dtype).expand(len(x_BTE), -1, -1)


def _put(x_BTE: Tensor, tokens_NE: Tensor, start: int) -> Tensor:
    """Return the rows with the tokens at `start` and behind; a start below 0 counts from the end."""
    start %= x_BTE.shape[1]
    behind_BTE = x_BTE[:, start + len(tokens_NE) :]
    return torch.cat([x_BTE[:, :start], _for_rows(tokens_NE, x_BTE), behind_BTE], 1)


@contextmanager
def _entered(blocks: Sequence[nn.Module], further: Sequence[Tensor], start: int) -> Iterator[None]:
    """Put tokens into the input of the second block, of the third, ..."""

    def enter(tokens_NE: Tensor) -> Any:
        return lambda _, inputs: (_put(inputs[0], tokens_NE, start), *inputs[1:])

    pairs = zip(blocks[1:], further, strict=False)
    handles = [block.register_forward_pre_hook(enter(tokens)) for block, tokens in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(tower: Any) -> list[nn.Module]:
    """Return a tower's transformer blocks, also in a copy for attacks (`fast`)."""
    found = (module for name, module in tower.named_modules() if name.rpartition(".")[2] == "resblocks")
    return list(cast(nn.ModuleList, next(found)))


def _towers(clip: Clip) -> tuple[int, int, int]:
    """Return the number of blocks that both towers have, and the widths of the text and of the image tower."""
    (_, width), wide = WithContext.shape(clip, 1), token_width(clip)
    return min(len(_blocks(clip.text_tower.transformer)), len(_blocks(clip.model.visual))), width, wide


def _layouts(clip: Clip) -> dict[int, tuple[int, list[tuple[int, int]]]]:
    """Return, by the length of `learned`, N and each block's map as (width of what is learned, width of the other).

    No two have the same length, since a map is larger than the tokens of all blocks.
    """
    most, width, wide = _towers(clip)
    maps = [(width, wide)] + [(wide, width)] * (most - 1)
    return {
        sum(count * own + own * other + other for own, other in maps[:depth]): (count, maps[:depth])
        for count in range(1, 1 + len(CONTEXT.split()))
        for depth in range(1, 1 + most)
    }


def _linear(fan_in: int, fan_out: int, generator: torch.Generator) -> list[Tensor]:
    """Return a weight and a bias as `nn.Linear` draws them, from U(−1/√fan_in, 1/√fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return [bound * (2 * torch.rand(shape, generator=generator) - 1) for shape in ((fan_out, fan_in), (fan_out,))]

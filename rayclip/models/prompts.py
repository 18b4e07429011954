"""Learned prompts around a frozen CLIP: a context in front of every text, or a frame around every image.

The learned part is one tensor, saved separately from the model (`checkpoint`) and loaded onto it as `prompted:DIR`.

Shapes: B batch, L tokens, N context tokens, W width of the text tower, S side of the image tower's input, F pixels of
it that the frame covers.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.clip import Clip
from rayclip.models.image import class_token_tower
from rayclip.models.text import causal_tower, encode_causal
from rayclip.store import Store
from rayclip.types import UserError

FRAME_SHARE = 30 / 224  # Bahng et al. 2022: 30 pixels of 224


class Prompted(Clip):
    """A CLIP with frozen weights and a learned prompt around it.

    Attributes:
        kind: name of the class in files.
        learned: the only parameter.
    """

    kind: ClassVar[str]

    def __init__(self, base: Clip, learned: Tensor) -> None:
        """Raise a `UserError` if the shape of `learned` does not fit `base`, or `base` has a prompt already."""
        if isinstance(base, Prompted):
            raise UserError(f"model '{base.spec}' has a learned prompt already: name the model that it stands on.")
        super().__init__(base.model, base.config, base._tokenizer, base.spec)
        self.resize = base.resize
        self.learned = nn.Parameter(learned)
        self.to(base.mean)
        if learned.shape != (wanted := self.shape(base, len(learned))):
            raise UserError(f"a {self.kind} of shape {tuple(learned.shape)} does not fit '{base.spec}': {wanted}.")

    @classmethod
    def shape(cls, base: Clip, count: int) -> tuple[int, ...]:
        """Return the shape of the tensor learned around `base`.

        Args:
            count: length of its first axis, if that can be chosen.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Keep eval mode always: dropout and BatchNorm's statistics belong to the frozen model, too."""
        return super().train(False)

    def bound_scale(self) -> None:
        """Do nothing: the model is frozen, and so is its temperature."""

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        if part != "prompt":
            raise UserError(
                f"model '{self.spec}' is a learned prompt around a frozen model: fine-tune that model, and learn a "
                "prompt for the result."
            )
        return [self.learned]

    @cached_property
    def base_fingerprint(self) -> str:
        return super().fingerprint()

    def fingerprint(self) -> str:
        learned = self.learned.detach().float().cpu().contiguous().numpy()
        return hashlib.sha256(f"{self.base_fingerprint}{self.kind}".encode() + learned.tobytes()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return a checkpoint's description of the prompt: enough to load it onto its model again."""
        base = self.spec
        if base.startswith("local-dir:"):
            base = f"local-dir:{Store(base.removeprefix('local-dir:')).root}"
        return {"kind": self.kind, "base": base, "base_fingerprint": self.base_fingerprint}


class WithContext(Prompted):
    """N vectors between the start mark and the first word of every text, in place of word embeddings (CoOp, AdvPT).

    Class prompts are the bare names: the context replaces the template. A text that is too long is truncated before its
    end mark.
    """

    kind = "context"
    template = "{}"

    @classmethod
    def shape(cls, base: Clip, count: int) -> tuple[int, ...]:
        tower = base.text_tower
        if not hasattr(tower, "token_embedding") or not hasattr(base._tokenizer, "encoder"):
            raise UserError(
                f"the text encoder of '{base.spec}' is not CLIP's own, which a learned context needs: use another "
                "method, such as vp."
            )
        return count, tower.token_embedding.embedding_dim

    @classmethod
    def begin(cls, base: Clip, count: int, seed: int) -> Self:
        """Return a random context, N(0, 0.02²), of `count` tokens but at most half of what the text tower reads."""
        shape = cls.shape(base, min(count, base.text_tower.context_length // 2))
        return cls(base, 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    @property
    def room(self) -> int:
        """Number of tokens that the context leaves for a text."""
        return super().room - len(self.learned)

    def encode_text(self, tokens_BL: Tensor, *, normalize: bool = True) -> Tensor:
        if 0 < self._chunk < len(tokens_BL):
            return self._by_chunk(WithContext.encode_text, tokens_BL, normalize)
        return self.encode_behind(self.learned, tokens_BL, normalize=normalize)

    def encode_behind(self, context_NW: Tensor, tokens_BL: Tensor, *, normalize: bool = True) -> Tensor:
        """Return `encode_text` with another context in place of the learned one."""
        count, tower = len(context_NW), self.text_tower
        start_B1 = tokens_BL[:, :1]
        # Start marks hold the context's positions: they are not padding, and lower than the end mark.
        longer_BL = torch.cat([start_B1, start_B1.expand(-1, count), tokens_BL[:, 1:]], 1)
        cut_BL, end_B = longer_BL[:, : tower.context_length].clone(), longer_BL.amax(1)
        cut_BL[:, -1] = torch.where(cut_BL.amax(1) < end_B, end_B, cut_BL[:, -1])

        def insert(words_BLW: Tensor) -> Tensor:
            context_BNW = context_NW.to(words_BLW.dtype).expand(len(words_BLW), -1, -1)
            return torch.cat([words_BLW[:, :1], context_BNW, words_BLW[:, 1 + count :]], 1)

        if causal_tower(self.model) is not None:
            raw_BD = encode_causal(tower, cut_BL, insert(tower.token_embedding(cut_BL)))
            return F.normalize(raw_BD, dim=-1) if normalize else raw_BD
        handle = tower.token_embedding.register_forward_hook(lambda _, __, words_BLW: insert(words_BLW))
        try:
            return self._encode_full(cut_BL, normalize)
        finally:
            handle.remove()

    def embed_texts(self, texts: Sequence[str], *, chunk: int = 256, normalize: bool = True) -> Tensor:
        """Return the same as `Clip.embed_texts`, with each text in a row of its own."""
        return torch.cat([self.encode_text(part, normalize=normalize) for part in self.tokenize(texts).split(chunk)])


class WithFrame(Prompted):
    """A frame added to every image at the size of the tower's input, after normalisation (visual prompting).

    It is 30 pixels wide at 224, in proportion at other sizes, at least 1; it is added to the image's border, which
    shows through.
    """

    kind = "frame"

    @classmethod
    def shape(cls, base: Clip, count: int) -> tuple[int, ...]:
        return 3, int(frame_mask(base.image_size).sum())

    @classmethod
    def begin(cls, base: Clip, seed: int | None = None) -> Self:
        """Return an empty frame, which leaves the model unchanged; with a seed, one drawn from N(0, 1)."""
        return cls(base, _start(cls.shape(base, 3), seed))

    def tower_input(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = super().tower_input(pixels_BCHW)
        frame = x_BCHW.new_zeros(3, self.image_size**2)
        frame = frame.index_copy(1, _frame_places(self.image_size, x_BCHW.device), self.frame.to(x_BCHW.dtype))
        return x_BCHW + frame.view(x_BCHW.shape[1:])

    @property
    def frame(self) -> Tensor:
        """The frame's pixels, `(3, F)`."""
        return self.learned


class WithFrameAndTokens(WithFrame):
    """The frame, and T vectors that the image tower reads after its patches, without a position (Mao et al. 2023).

    `learned` holds the frame's 3·F values, then the tokens' T·E, with E the width of the image tower.
    """

    kind = "frame+tokens"
    appends_tokens = True

    @classmethod
    def shape(cls, base: Clip, count: int) -> tuple[int, ...]:
        pixels, width = 3 * int(frame_mask(base.image_size).sum()), token_width(base)
        return (pixels + max(1, round((count - pixels) / width)) * width,)

    @classmethod
    def begin(cls, base: Clip, seed: int | None = None, tokens: int = 10) -> Self:
        """Return tokens drawn from N(0, 1), and a frame drawn likewise with a seed, else empty."""
        count = cls.shape(base, 0)[0] + (tokens - 1) * token_width(base)
        learned = _start((count,), seed or 0)
        if seed is None:
            learned[: 3 * int(frame_mask(base.image_size).sum())] = 0
        return cls(base, learned)

    @property
    def frame(self) -> Tensor:
        return self.learned[: 3 * int(frame_mask(self.image_size).sum())].view(3, -1)

    def encode_image(self, pixels_BCHW: Tensor, *, normalize: bool = True) -> Tensor:

        def append(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x_BTE = inputs[0]
            tokens_TE = self.learned[self.frame.numel() :].view(-1, x_BTE.shape[2]).to(x_BTE.dtype)
            return (torch.cat([x_BTE, tokens_TE.expand(len(x_BTE), -1, -1)], 1),)

        handle = entrance(self).register_forward_pre_hook(append)
        try:
            return super().encode_image(pixels_BCHW, normalize=normalize)
        finally:
            handle.remove()


def token_width(clip: Clip) -> int:
    """Return E, the width of the image tower's tokens.

    Raises:
        UserError: the tower is not open_clip's own ViT with class-token pooling.
    """
    if class_token_tower(clip.model) is None:
        raise UserError(
            f"the image encoder of '{clip.spec}' takes no tokens besides its patches: use a ViT of open_clip's own, "
            "such as ViT-B-32, or a method without them."
        )
    return int(cast(nn.Module, clip.model.visual).class_embedding.shape[0])  # type: ignore[index]


def entrance(clip: Clip) -> nn.Module:
    """Return the module that all tokens of the image tower pass first, also in a copy for attacks (`fast`)."""
    modules = cast(nn.Module, clip.model.visual).named_modules()
    return next(module for name, module in modules if name.rpartition(".")[2] == "ln_pre")


@lru_cache(maxsize=16)
def _frame_places(side: int, device: torch.device) -> Tensor:
    """Return the positions of the frame's pixels in a flattened image; kept, as finding them waits for the device."""
    return frame_mask(side).flatten().nonzero().squeeze(1).to(device)


def _start(shape: tuple[int, ...], seed: int | None) -> Tensor:
    return torch.zeros(shape) if seed is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frame_mask(side: int) -> Tensor:
    """Return where the frame of an image of `side` pixels is, `(side, side)` bool."""
    width = max(1, round(FRAME_SHARE * side))
    mask = torch.ones(side, side, dtype=torch.bool)
    mask[width : side - width, width : side - width] = False
    return mask

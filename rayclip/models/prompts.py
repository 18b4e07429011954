"""Learned prompts around a frozen CLIP: a context in front of every text, or a frame around every image.

What is learned is one tensor, saved apart from the model (`checkpoint`) and loaded onto it as `prompted:DIR`.

Shapes: B batch, L tokens, N context tokens, W width of the text tower, S side of the image tower's input, F its pixels
that the frame covers.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rayclip.models.clip import Clip
from rayclip.store import Store
from rayclip.types import UserError

FRAME_SHARE = 30 / 224  # Bahng et al. 2022: 30 pixels of 224


class Prompted(Clip):
    """A CLIP whose weights stay as they are, with something learned around it.

    Attributes:
        kind: names the class in files.
        learned: the only parameter.
    """

    kind: ClassVar[str]

    def __init__(self, base: Clip, learned: Tensor) -> None:
        """Raises `UserError` if `learned` is not of the shape that `base` asks for, or `base` has a prompt already."""
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
        """Of what is learned around `base`.

        Args:
            count: what its first axis has, where that can be chosen.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Always in eval mode: dropout and BatchNorm's statistics are the frozen model's too."""
        return super().train(False)

    def bound_scale(self) -> None:
        """The model is frozen, its temperature too."""

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
        """What a checkpoint says of the prompt: enough to put it onto its model again."""
        base = self.spec
        if base.startswith("local-dir:"):
            base = f"local-dir:{Store(base.removeprefix('local-dir:')).root}"
        return {"kind": self.kind, "base": base, "base_fingerprint": self.base_fingerprint}


class WithContext(Prompted):
    """N vectors between the start mark and the first word of every text, in place of word embeddings (CoOp, AdvPT).

    Class prompts are the bare names: the context takes the template's place. A text that leaves no room is cut before
    its end mark.
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
        """A random context, N(0, 0.02²), of `count` tokens but at most half of what the text tower reads."""
        shape = cls.shape(base, min(count, base.text_tower.context_length // 2))
        return cls(base, 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    @property
    def room(self) -> int:
        """What the context leaves."""
        return super().room - len(self.learned)

    def encode_text(self, tokens_BL: Tensor, *, normalize: bool = True) -> Tensor:
        count, tower = len(self.learned), self.text_tower
        start_B1 = tokens_BL[:, :1]
        # Start marks hold the context's places: they are no padding, and lower than the end mark.
        longer_BL = torch.cat([start_B1, start_B1.expand(-1, count), tokens_BL[:, 1:]], 1)
        cut_BL, end_B = longer_BL[:, : tower.context_length].clone(), longer_BL.amax(1)
        cut_BL[:, -1] = torch.where(cut_BL.amax(1) < end_B, end_B, cut_BL[:, -1])

        def insert(_: nn.Module, __: Any, words_BLW: Tensor) -> Tensor:
            context_BNW = self.learned.to(words_BLW.dtype).expand(len(words_BLW), -1, -1)
            return torch.cat([words_BLW[:, :1], context_BNW, words_BLW[:, 1 + count :]], 1)

        handle = tower.token_embedding.register_forward_hook(insert)
        try:
            return super().encode_text(cut_BL, normalize=normalize)
        finally:
            handle.remove()

    def embed_texts(self, texts: Sequence[str], *, chunk: int = 256) -> Tensor:
        """As `Clip.embed_texts`, each text in a row of its own."""
        return torch.cat([self.encode_text(part) for part in self.tokenize(texts).split(chunk)])


class WithFrame(Prompted):
    """A frame added to every image at the size of the tower's input, after normalisation (visual prompting).

    It is 30 pixels wide at 224, at other sizes in proportion, at least 1; it lies on top of the image's border, which
    shows through.
    """

    kind = "frame"

    @classmethod
    def shape(cls, base: Clip, count: int) -> tuple[int, ...]:
        return 3, int(frame_mask(base.image_size).sum())

    @classmethod
    def begin(cls, base: Clip) -> Self:
        """An empty frame: the model as it is."""
        return cls(base, torch.zeros(cls.shape(base, 3)))

    def tower_input(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = super().tower_input(pixels_BCHW)
        frame_CHW = x_BCHW.new_zeros(x_BCHW.shape[1:])
        frame_CHW[:, frame_mask(self.image_size).to(x_BCHW.device)] = self.learned.to(x_BCHW.dtype)
        return x_BCHW + frame_CHW


def frame_mask(side: int) -> Tensor:
    """Where the frame of an image of `side` pixels is, `(side, side)` bool."""
    width = max(1, round(FRAME_SHARE * side))
    mask = torch.ones(side, side, dtype=torch.bool)
    mask[width : side - width, width : side - width] = False
    return mask


KINDS: dict[str, type[Prompted]] = {kind.kind: kind for kind in (WithContext, WithFrame)}

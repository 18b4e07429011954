"""Any open_clip model as a CLIP that takes [0, 1] pixels.

The wrapper handles what scripts of the field copy around: normalisation, the differentiable resize of images that are
attacked at their native resolution, and the activation (QuickGELU) that the weights were trained with.

Shapes: B batch, C channels, H W any size, D embedding, L context length.
"""

import copy
import hashlib
import json
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayclip.models.cutting import find_cut
from rayclip.models.exact import widened
from rayclip.models.image import class_token_tower, encode_class_token
from rayclip.models.remembered import Remembered
from rayclip.models.resizing import Resize, resized
from rayclip.models.text import Packed, causal_tower, encode_causal, encode_packed, end_marks, pack
from rayclip.types import UserError

# Parts of an image tower ahead of its transformer blocks, by open_clip's names and by timm's
_BEFORE_BLOCKS = {
    *("class_embedding", "positional_embedding", "conv1", "ln_pre"),
    *("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre"),
}

_BESIDE = {"logit_bias", "text_decoder"}  # parts of a model that no embedding depends on

_REMEMBERED = 100_000  # texts per tokenizer: some 50 MB
_MAX_LOG_SCALE = 4.605170185988092  # ln 100: the temperature's bound in CLIP's own training

# Kept beside the tokenizers, since copies of a model share one, and the memory is no part of the model
_token_rows: WeakKeyDictionary[Any, Remembered[str, np.ndarray]] = WeakKeyDictionary()


def _rows_of(tokenizer: Any) -> Remembered[str, np.ndarray]:
    """Return the function from texts to the rows that a tokenizer makes of them."""
    if tokenizer not in _token_rows:
        known = weakref.proxy(tokenizer)  # no key may be reached from its own value
        _token_rows[tokenizer] = Remembered(lambda texts: known(list(texts)).int().numpy(), _REMEMBERED)
    return _token_rows[tokenizer]


class Clip(nn.Module):
    """An open_clip model with its preprocessing inside.

    Attributes:
        spec: the specification that the user gave.
        config: `model_cfg` and `preprocess_cfg` as open_clip writes them; enough to rebuild the model from weights.
        image_size: side of the square input of the image tower, in pixels.
        template: class-prompt template, for a model that was trained on one of its own.
        resize: how images of another size are resized to `image_size` (`models.resizing`).
        appends_tokens: whether its image tower reads learned tokens besides its patches.
        enters_blocks: whether it puts learned tokens between the blocks of its image tower.
        normalizes: whether `tower_input` normalises; if not, the image tower does (`models.fast`).
        own_forward: whether only the module's own forward passes may be used (`models.wrapped`).
    """

    template: str | None = None
    resize: Resize = "antialias"
    appends_tokens: bool = False
    enters_blocks: bool = False
    normalizes: bool = True
    own_forward: bool = False
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: dict[str, Any], tokenizer: Any, spec: str) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.spec = spec
        self._tokenizer = tokenizer
        self._chunk = 0
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        self.image_size = int(size[0] if isinstance(size, list | tuple) else size)
        preprocess = config["preprocess_cfg"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), kept at or below 100 as in CLIP's own training; SigLIP's has no bound. Scalar."""
        written = cast(Tensor, self.model.logit_scale)
        return (written if self.bias is not None else written.clamp(max=_MAX_LOG_SCALE)).exp()

    @property
    def bias(self) -> nn.Parameter | None:
        """SigLIP's logit_bias, None for other models.

        Only losses of pairs read it (`methods.losses.contrastive`). Zero-shot logits leave it out: added to all classes
        it changes no prediction, margin, rank or softmax, and so no attack or loss that is made of those.
        """
        return getattr(self.model, "logit_bias", None)

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Clamp logit_scale to its bound, if it has one, as CLIP's training does after each step.

        In training, the clamp in `scale` does not suffice: it has no gradient beyond the bound, hence a value slightly
        below it.
        """
        if self.bias is None:
            cast(Tensor, self.model.logit_scale).clamp_(max=_MAX_LOG_SCALE - 1e-6)

    def encode_image(self, pixels_BCHW: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed images. `(B, 3, H, W)` in [0, 1] -> `(B, D)`; differentiable in the pixels.

        Images of another size than `image_size` are resized bicubically, as `resize` says.
        """
        if 0 < self._chunk < len(pixels_BCHW):
            return self._by_chunk(Clip.encode_image, pixels_BCHW, normalize)
        x_BCHW, tower = self.tower_input(pixels_BCHW), class_token_tower(self.model)
        if tower is None:
            return self.model.encode_image(x_BCHW, normalize=normalize)  # type: ignore[operator]
        raw_BD = encode_class_token(tower, x_BCHW)
        return F.normalize(widened(raw_BD), dim=-1) if normalize else raw_BD

    def tower_input(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the image tower's input: resized and normalised, `(B, 3, image_size, image_size)`."""
        x_BCHW = resized(pixels_BCHW, self.image_size, self.resize)
        return (x_BCHW - self.mean) / self.std if self.normalizes else x_BCHW

    def with_resize(self, how: Resize) -> Self:
        """Return a model that shares all weights but resizes in another way; this one does not change."""
        if how == self.resize:
            return self
        other = copy.copy(self)
        other.resize = how
        return other

    def encode_text(self, tokens_BL: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed token rows, as long as `tokenize` makes them or longer. `(B, L)` int64 -> `(B, D)`."""
        if 0 < self._chunk < len(tokens_BL):
            return self._by_chunk(Clip.encode_text, tokens_BL, normalize)
        tower = causal_tower(self.model)
        if tower is None:
            return self._encode_full(tokens_BL, normalize)
        raw_BD = encode_causal(tower, tokens_BL)
        return F.normalize(widened(raw_BD), dim=-1) if normalize else raw_BD

    def _encode_full(self, tokens_BL: Tensor, normalize: bool) -> Tensor:
        """Encode with the model's own pass, which needs rows of full length; shorter rows are padded."""
        missing = getattr(self.text_tower, "context_length", 0) - tokens_BL.shape[1]
        if missing > 0:
            tokens_BL = F.pad(tokens_BL, (0, missing))
        return self.model.encode_text(tokens_BL, normalize=normalize)  # type: ignore[operator]

    @contextmanager
    def in_chunks(self, size: int) -> Iterator[None]:
        """Encode at most `size` images or texts at a time, for batches whose activations do not fit into memory.

        Only the embeddings are kept; the backward pass encodes chunk after chunk once more. Values and gradients are
        those of the whole batch, also for losses that compare its samples with each other.
        """
        previous, self._chunk = self._chunk, size
        try:
            yield
        finally:
            self._chunk = previous

    def _by_chunk(self, encode: Callable[..., Tensor], rows: Tensor, normalize: bool) -> Tensor:
        parts = rows.split(self._chunk)
        return torch.cat([checkpoint(encode, self, part, normalize=normalize, use_reentrant=False) for part in parts])

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token rows of the texts on the model's device, `(B, L)` int64; texts longer than its context are
        truncated.

        L is the context length, or with a causal text tower only what the longest of the texts needs. That is computed
        before the rows go to the device, so that nothing waits for the device.
        """
        tokens_BL, tower = self.token_rows(texts), causal_tower(self.model)
        if tower is not None and len(tokens_BL):
            tokens_BL = tokens_BL[:, : int(end_marks(tower, tokens_BL).max()) + 1]
        return tokens_BL.to(self.device, non_blocking=True)

    def token_rows(self, texts: Sequence[str]) -> Tensor:
        """Return token rows of full length on the CPU, `(B, L)` int64. The rows of recent texts are remembered."""
        if not len(texts):
            return self._tokenizer([])
        rows = _rows_of(self._tokenizer)(texts)
        return torch.from_numpy(np.concatenate(rows).reshape(len(rows), -1)).long()

    @property
    def room(self) -> int:
        """Number of tokens of a text that the model reads, including start and end mark."""
        return int(self._tokenizer([""]).shape[1])

    def cut_texts(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct texts that are longer than `room` and therefore truncated."""
        return find_cut(self._tokenizer, texts, self.room)

    def embed_texts(self, texts: Sequence[str], *, chunk: int = 256, normalize: bool = True) -> Tensor:
        """Return embeddings of any number of texts, `(len(texts), D)`.

        Equal texts are encoded once, `chunk` rows at a time; with a causal text tower, common beginnings of texts are
        encoded once, too (`models.text`).
        """
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens_TL, tower = self.token_rows(list(place)), causal_tower(self.model)
        found = np.arange(len(place))
        if tower is None or not place:
            rows = [part.to(self.device, non_blocking=True) for part in tokens_TL.split(chunk)]
            parts = [self.encode_text(part, normalize=normalize) for part in rows]
        else:
            ends_T = end_marks(tower, tokens_TL) + 1
            packed = pack(tokens_TL.numpy(), ends_T.numpy(), tokens_TL.shape[1], min(chunk, self._chunk or chunk))
            found[np.concatenate([part.texts_B for part in packed])] = np.arange(len(place))
            parts = [self._encode_packed(tower, part.to(self.device), normalize) for part in packed]
        index = torch.from_numpy(found[[place[text] for text in texts]])
        return torch.cat(parts)[index.to(self.device, non_blocking=True)]

    def _encode_packed(self, tower: Any, packed: Packed, normalize: bool) -> Tensor:
        def encode(part: Packed) -> Tensor:
            raw_BD = encode_packed(tower, part)
            return F.normalize(widened(raw_BD), dim=-1) if normalize else raw_BD

        return checkpoint(encode, packed, use_reentrant=False) if self._chunk else encode(packed)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token string -> row of the token table; whole words end in `</w>`. Only for CLIP's own tokenizer."""
        encoder = getattr(self._tokenizer, "encoder", None)
        if encoder is None:
            raise UserError(
                f"model '{self.spec}' does not use CLIP's own tokenizer and its words: take substitutes from a masked "
                "language model instead (substitutes=bert-base-uncased), and leave constrain away."
            )
        return encoder

    @cached_property
    def whole_words(self) -> list[tuple[str, int]]:
        """The vocabulary's whole alphabetic words of two letters or more, and their rows of the token table."""
        ending = "</w>"
        words = [(t.removesuffix(ending), row) for t, row in self.vocabulary.items() if t.endswith(ending)]
        return [(w, row) for w, row in words if len(w) > 1 and w.isascii() and w.isalpha()]

    @property
    def token_table(self) -> Tensor:
        """The text tower's token embeddings, `(vocabulary, width)`."""
        return cast(Tensor, self.text_tower.token_embedding.weight)

    @property
    def text_tower(self) -> Any:
        """The module that holds the text encoder's parts: the model itself, or a submodule."""
        return self.get_submodule("model.text" if hasattr(self.model, "text") else "model")

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Return the parameters that a run trains.

        Args:
            part: `all` that the embeddings and their temperature depend on, hence neither SigLIP's bias nor CoCa's
                decoder of texts; `image` or `text`, an encoder; or `last-N`, the image encoder's last N transformer
                blocks and what comes after them (final norm, pooling, projection).

        Raises:
            UserError: an unknown part, a tower without transformer blocks, or one with fewer than N.
        """
        if part in ("all", "text"):
            others = _BESIDE | {"visual", "logit_scale"} if part == "text" else _BESIDE
            return [p for name, p in self.model.named_parameters() if others.isdisjoint(name.split("."))]
        visual = cast(nn.Module, self.model.visual)
        if part == "image":
            return list(visual.parameters())
        if not re.fullmatch(r"last-[1-9]\d*", part):
            raise UserError(f"trains '{part}' is no part of a model: write all, image, text, or last-N such as last-2.")
        blocks, count = self._image_blocks(), int(part.removeprefix("last-"))
        if count > len(blocks):
            raise UserError(
                f"trains '{part}': the image encoder of '{self.spec}' has {len(blocks)} transformer blocks: write "
                f"last-{len(blocks)} or less."
            )
        before = {id(p) for block in blocks[: len(blocks) - count] for p in block.parameters()}
        return [
            p
            for name, p in visual.named_parameters()
            if id(p) not in before and name.removeprefix("trunk.").split(".")[0] not in _BEFORE_BLOCKS
        ]

    def _image_blocks(self) -> list[nn.Module]:
        for path in ("transformer.resblocks", "trunk.blocks"):  # open_clip's own tower, and timm's
            with suppress(AttributeError):
                return list(cast(nn.Module, self.model.visual).get_submodule(path).children())
        raise UserError(f"the image encoder of '{self.spec}' has no transformer blocks to choose from: train image.")

    def fingerprint(self) -> str:
        """Return a hash of configuration and weights: equal for equal functions, however the model was named or
        stored."""
        digest = hashlib.sha256(json.dumps(self.config["model_cfg"], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Set eval mode and turn off the parameters' gradients, as attacks need; restores both of every part afterwards."""
    trained = [module for module in model.modules() if module.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module in trained:
            module.training = True

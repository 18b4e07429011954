"""A CLIP of the caller's own, with whatever was changed in it: only its own forward passes are used.

`models.image` and `models.text` are faster than open_clip's towers where these are stock in every part. A module that
is wrapped here never takes them, since it is there for what was changed.

Shapes: B batch, C H W image, D embedding, L tokens of a text.
"""

import hashlib
import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.models.clip import Clip, frozen
from rayclip.models.exact import widened
from rayclip.types import UserError

# transformers' text towers that read a text's embedding as well without a mask of the padding behind it
_WITHOUT_MASK = ("clip_text_model", "siglip_text_model")
_PROBE_DIGITS = 3  # of the numbers that tell functions apart: far coarser than rounding differences


class Preprocessing(NamedTuple):
    """Normalisation, and the side of the square input in pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


class WrappedClip(Clip):
    """A module with a CLIP's two towers: open_clip's or OpenAI's `encode_image` and `encode_text`, or transformers'
    `get_image_features` and `get_text_features`. The module stays the caller's: nothing of it is copied.

    Raises:
        UserError: what was given is none, or module, preprocessing and tokenizer do not belong together.
    """

    own_forward = True

    def __init__(self, module: nn.Module, preprocess: Any, tokenizer: Any, spec: str) -> None:
        given = read_preprocessing(preprocess)
        kind = type(module)
        config = {
            "model_cfg": {"module": f"{kind.__module__}.{kind.__qualname__}", "vision_cfg": {"image_size": given.size}},
            "preprocess_cfg": {"mean": given.mean, "std": given.std},
        }
        super().__init__(_Towers(module), config, _Tokenizer(tokenizer, _context_length(module)), spec)
        self.training = module.training
        self._check()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tower_input(self, pixels_BCHW: Tensor) -> Tensor:
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)  # where the caller has moved it
        return super().tower_input(pixels_BCHW)

    def fingerprint(self) -> str:
        """Return a hash of weights and of what the module makes of a picture and a text: code may have changed, too."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for embedded in self._probe():
            rounded = embedded.double().cpu().mul(10**_PROBE_DIGITS).round().int()
            digest.update(rounded.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def _probe(self) -> list[Tensor]:
        noise = torch.rand(1, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0))
        with frozen(self):
            return [self.encode_image(noise.to(self.device)), self.encode_text(self.tokenize(["a photo of a cat"]))]

    def _check(self) -> None:
        """Raise a `UserError` unless both towers take what preprocessing and tokenizer promise."""
        try:
            image_BD, text_BD = self._probe()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"the module does not take images of {self.image_size} pixels and the tokenizer's texts as a CLIP "
                f"would ({type(error).__name__}: {said}): give preprocess and tokenizer that belong to it."
            ) from error
        if image_BD.ndim != 2 or image_BD.shape != text_BD.shape:
            shapes = " and ".join(str(tuple(x.shape)) for x in (image_BD, text_BD))
            raise UserError(f"an image and a text become {shapes}: both towers have to return (B, D), with the same D.")


class _Towers(nn.Module):
    """A module behind the names by which `Clip` calls its towers. Takes and returns fp32 or wider."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        names = [("encode_image", "encode_text"), ("get_image_features", "get_text_features")]
        found = [pair for pair in names if all(callable(getattr(module, name, None)) for name in pair)]
        if not found or not isinstance(getattr(module, "logit_scale", None), Tensor):
            raise UserError(
                f"a {type(module).__name__} is no CLIP: it needs logit_scale, and encode_image and encode_text as in "
                "open_clip, or get_image_features and get_text_features as in transformers."
            )
        kind = getattr(getattr(getattr(module, "config", None), "text_config", None), "model_type", _WITHOUT_MASK[0])
        if kind not in _WITHOUT_MASK:
            raise UserError(f"text towers of the kind {kind} want masks of their padding, which wrap does not give.")
        self._names = found[0]
        self.training = module.training

    @property
    def logit_scale(self) -> Tensor:
        return cast(Tensor, self.module.logit_scale)

    @property
    def visual(self) -> nn.Module:
        return cast(nn.Module, getattr(self.module, "visual", None) or self.module)

    @property
    def token_embedding(self) -> nn.Module:
        for path in ("token_embedding", "text.token_embedding", "text_model.embeddings.token_embedding"):
            with suppress(AttributeError):
                return self.module.get_submodule(path)
        raise UserError(
            f"a {type(self.module).__name__} has no token table that is known here: take substitutes from a masked "
            "language model instead (substitutes=bert-base-uncased)."
        )

    def encode_image(self, x_BCHW: Tensor, normalize: bool = False) -> Tensor:
        dtype = getattr(self.module, "dtype", None) or next(self.module.parameters()).dtype
        return self._embed(self._names[0], x_BCHW.to(dtype), normalize)

    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor:
        return self._embed(self._names[1], tokens_BL, normalize)

    def _embed(self, name: str, inputs: Tensor, normalize: bool) -> Tensor:
        method = getattr(self.module, name)
        raw = {"normalize": False} if "normalize" in inspect.signature(method).parameters else {}  # CoCa's default
        found = method(inputs, **raw)
        found = found if isinstance(found, Tensor) else found.pooler_output  # transformers 5
        return F.normalize(widened(found), dim=-1) if normalize else widened(found)


class _Tokenizer:
    """A tokenizer of open_clip, OpenAI's or transformers, called as open_clip's are; texts that are too long are cut.

    Args:
        room: tokens of a row; None if only the tokenizer knows.
    """

    def __init__(self, tokenizer: Any, room: int | None) -> None:
        self._inner = tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer  # of a processor
        self._room = room
        if not callable(self._inner):
            raise UserError(
                "tokenizer has to be open_clip's, OpenAI's or transformers': open_clip.get_tokenizer(NAME)."
            )

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        room = context_length or self._room
        if callable(getattr(self._inner, "convert_ids_to_tokens", None)):  # transformers
            room = room or min(self._inner.model_max_length, 77)
            if not len(texts):
                return torch.empty(0, room, dtype=torch.int64)
            options = {"padding": "max_length", "truncation": True, "max_length": room, "return_tensors": "pt"}
            return self._inner(list(texts), **options)["input_ids"]
        known = inspect.signature(self._inner).parameters
        options = {"context_length": room} if room and "context_length" in known else {}
        return self._inner(list(texts), **options, **({"truncate": True} if "truncate" in known else {}))

    @property
    def encoder(self) -> dict[str, int]:
        """CLIP's vocabulary, token string -> row; an AttributeError if it is another one."""
        found = getattr(self._inner, "encoder", None) or self._inner.get_vocab()
        if "cat</w>" not in found:
            raise AttributeError("not CLIP's vocabulary")
        return found


def _context_length(module: nn.Module) -> int | None:
    """Return how many tokens of a text a module reads; None if it does not say."""
    for holder in (module, getattr(module, "text", None)):
        if isinstance(length := getattr(holder, "context_length", None), int):
            return length
    config = getattr(getattr(module, "config", None), "text_config", None)
    return getattr(config, "max_position_embeddings", None)


def read_preprocessing(given: Any) -> Preprocessing:
    """Return normalisation and size of a `(mean, std, size)` tuple, of a torchvision `Compose` such as open_clip's, or
    of an image processor (or processor) of transformers.

    Raises:
        UserError: it is none of these, or does not say all three.
    """
    given = getattr(given, "image_processor", given)
    mean: Any = (0.0, 0.0, 0.0)
    std: Any = (1.0, 1.0, 1.0)  # without normalisation, the module normalises by itself
    size: Any = None
    if isinstance(given, tuple | list) and len(given) == 3:
        mean, std, size = given
    elif isinstance(steps := getattr(given, "transforms", None), list | tuple | nn.ModuleList):
        for step in steps:
            if hasattr(step, "mean") and hasattr(step, "std"):
                mean, std = step.mean, step.std
            size = getattr(step, "size", size)
    elif hasattr(given, "image_mean"):
        if given.do_normalize:
            mean, std = given.image_mean, given.image_std
        size = given.crop_size if getattr(given, "do_center_crop", False) else given.size
    sides = _sides(size)
    try:
        found = Preprocessing(tuple(map(float, mean)), tuple(map(float, std)), int(min(sides)))
    except (TypeError, ValueError):
        found = Preprocessing((), (), 0)
    if len(set(sides)) != 1 or found.size < 1 or len(found.mean) != 3 or len(found.std) != 3 or min(found.std) <= 0:
        raise UserError(
            "preprocess has to say mean, std and a square input size: give open_clip's or torchvision's Compose, an "
            "image processor of transformers, or a tuple such as ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 224)."
        )
    return found


def _sides(size: Any) -> list[Any]:
    """Return the sides of a size: 224, (224, 224), {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if size is None or isinstance(size, int):
        return [size]
    if isinstance(size, tuple | list):
        return list(size)
    named = (getattr(size, name, None) or (size.get(name) if hasattr(size, "get") else None) for name in _EDGES)
    return [side for side in named if side is not None] or [None]


_EDGES = ("height", "width", "shortest_edge")

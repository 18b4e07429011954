"""Refuses files that claim more than they hold: what reads them would take all the memory for it."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayclip.types import UserError

_PACKED = 20  # times that an archive may unpack to its size: weights hardly compress
_TOKENS = 100_000  # of an image or a text: 4096 pixels in patches of 14 are 85,000
_FREE = ("image_size", "context_length")  # may be other than those that the weights were made for
_COUNTS = ("layers",)
_PARTS, _TOWERS = ("model_cfg", "preprocess_cfg"), ("vision_cfg", "text_cfg")
_CLIPS_VOCABULARY = 49_408  # also of a configuration beside weights of the image tower alone, which are told as that


def check_unpacked(file: Path) -> None:
    """Raise a `UserError` if a zip archive would unpack to far more than its size, and a `zipfile.BadZipFile`,
    `ValueError` or `OSError` if it is damaged."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > _PACKED * file.stat().st_size:
        raise UserError(f"{file} is refused: it would unpack to {unpacked:,} bytes, which no weights do.")


def is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor from a file has all its numbers in memory, as files of weights have them."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_form(described: Any, where: object) -> None:
    """Raise a `UserError` if what an open_clip configuration says of its towers and of normalisation is no such thing;
    the rest open_clip reports itself."""
    model_cfg, preprocess = ((described.get(key) if isinstance(described, dict) else None) for key in _PARTS)
    towers = [model_cfg.get(name, {}) for name in _TOWERS] if isinstance(model_cfg, dict) else []
    usual = preprocess if isinstance(preprocess, dict) else {}
    numbers = [usual[name] for name in ("mean", "std") if name in usual]
    right = all(isinstance(tower, dict) for tower in towers) and all(
        isinstance(each, list) and len(each) == 3 and all(isinstance(x, int | float) for x in each) for each in numbers
    )
    if not right:
        raise UserError(f"{where} is no configuration of open_clip: put the model's own there.")


def check_sizes(model_cfg: Any, weights: Iterable[Tensor], where: object) -> None:
    """Raise a `UserError` if an open_clip configuration describes a model that is larger than the weights beside it."""
    shapes = [tensor.shape for tensor in weights]
    largest = max((side for shape in shapes for side in shape), default=0)
    for path, value in _numbers(model_cfg):
        key = path[-1]
        most = len(shapes) if key in _COUNTS else _TOKENS if key in _FREE else largest
        most = max(most, _CLIPS_VOCABULARY) if key == "vocab_size" else most
        if abs(value) > most:
            raise UserError(
                f"{where}: its {'.'.join(path)} of {value:.6g} does not fit the weights beside it: put the right "
                "configuration there."
            )
    for tower in model_cfg.values() if isinstance(model_cfg, dict) else ():
        found = dict(_numbers(tower))
        size, patch = (abs(found.get((key,), 1)) for key in ("image_size", "patch_size"))
        if (size / max(patch, 1)) ** 2 > _TOKENS or found.get(("width",), 1) * found.get(("mlp_ratio",), 1) > largest:
            raise UserError(f"{where}: its towers do not fit the weights beside it: put the right configuration there.")


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, (*path, str(key)))
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value

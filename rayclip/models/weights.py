"""Reads files of weights in the field's formats, as weights only, and matches them with a model by its own names.

The tensors may be wrapped in `state_dict` (open_clip, Lightning), `model` (MMCoA), `vision_encoder_state_dict` (TeCoA,
PMG-AFT, TGA-ZSR, SAFT) or nothing (RobustVLM), and their names may be prefixed by `module.` (DataParallel),
`_orig_mod.` (torch.compile), `model.`, `vision_model.`, `visual.`, in any order. safetensors and TorchScript archives
(OpenAI's) are read too. No code of a file runs: a pickle that wants to call anything is refused, and of an archive only
the tensors are taken.
"""

import argparse
import hashlib
import io
import pathlib
import pickle
import pickletools
import re
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rayclip.models.sizes import check_unpacked, is_whole
from rayclip.types import UserError

_SHOWN = 3  # keys that an error names
_LEAST = 0.5  # smallest share of a tower's tensors that a file must name to count as its weights
# Entries besides weights in OpenAI's archives; and positions that transformers used to save
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_NEEDLESS = (*_OPENAI, "text.transformer.embeddings.position_ids")
_FIRST = ("vision_encoder_state_dict", "state_dict", "model")  # preferred among entries that fit equally well
_IMAGE_POSITIONS = ("positional_embedding", "visual.positional_embedding")
_DEEPEST = 3  # levels of nested entries
# Names of copies that may lie beside the trained weights
_COPIES = re.compile(r"(^|[._])(ema|swa|teacher|averaged|frozen|initial|original)([._]|$)")

# Types that training loops save beside weights, and torch does not read by itself: none of them calls anything. numpy 1
# and Python before 3.13 have other names for the same.
_NUMBER, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    *((_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}),
    *((pathlib.PurePosixPath, f"pathlib{kind}Path") for kind in (".Posix", "._local.Posix", ".PurePosix")),
    *(argparse.Namespace, types.SimpleNamespace),
]


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """The content of a file of weights.

    Attributes:
        groups: its tensors by the entries that contain them ("" at the top, else `state_dict` or the like) and name.
        entries: its top entries.
        quick_gelu: whether the activation is QuickGELU, if the file tells: OpenAI's archives do, and files whose
            entries show that they come from one.
    """

    path: Path
    groups: Mapping[str, Mapping[str, Tensor]]
    entries: tuple[str, ...]
    quick_gelu: bool | None


class Fitting(NamedTuple):
    """The weights of a file that belong to a model.

    Attributes:
        layout: the entry that contains them, or `state dict`.
        prefix: prefix of their names in the file.
        part: whether they are the `image` tower's or the `whole` CLIP's.
        weights: under the model's (tower's) names.
        left: entries and tensors of the file that were not used.
    """

    layout: str
    prefix: str
    part: Literal["image", "whole"]
    weights: dict[str, Tensor]
    left: tuple[str, ...]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(file: Path) -> WeightsFile:
    """Read a file's tensors; none of its code runs.

    Raises:
        UserError: no such file, no weights, or a pickle that would run code, with the reason.
    """
    _check(file)
    with file.open("rb") as opened:
        head = opened.read(9)
    quick_gelu = None
    if head[8:] == b"{":
        content: Any = read_safetensors(file)
    elif head.startswith(b"PK") and _is_archive(file):
        content, quick_gelu = _read_archive(file)
    else:
        content = read_pickle(file)
    groups: dict[str, dict[str, Tensor]] = {}
    for place, name, tensor in _tensors(content, ()):
        if not is_whole(tensor):
            raise _damaged(file)
        groups.setdefault(place, {})[name] = tensor
    is_openai = any(_OPENAI[0] in name.split(".") for group in groups.values() for name in group)
    return WeightsFile(
        path=file,
        groups=groups,
        entries=tuple(map(str, content)) if isinstance(content, Mapping) else (type(content).__name__,),
        quick_gelu=True if quick_gelu is None and is_openai else quick_gelu,
    )


def match(found: WeightsFile, model: nn.Module) -> Fitting:
    """Return the weights of a file that belong to an open_clip model, or to its image tower, however they are wrapped.

    If several fit (an averaged copy beside the trained weights), those that are not a copy are preferred.

    Raises:
        UserError: none fit, or the file has an image tower and a text tower that uses other names.
    """
    whole = set(model.state_dict())
    image = {name.removeprefix("visual.") for name in whole if name.startswith("visual.")}
    choices = []
    for place, group in found.groups.items():
        for part, names in (("whole", whole), ("image", image)):
            for prefix, count in _prefixes(group, names, part == "whole").items():
                is_little = count < _LEAST * len(names if part == "image" else image)
                first = _FIRST.index(place) if place in _FIRST else len(_FIRST)
                order = (is_little, bool(_COPIES.search(f"{place}.{prefix}")), first, -count, len(prefix))
                choices.append((order, place, prefix, part))
    best = min(choices, key=lambda choice: choice[0], default=None)
    if best is None or best[0][0]:
        shown = ", ".join(found.entries[:_SHOWN]) or "nothing"
        raise UserError(
            f"{found.path} is in no layout that is known, or of another architecture: nothing in it has the names of "
            f"this CLIP's weights or of its image tower's; it holds {shown}."
        )
    _, place, prefix, part = best
    group = found.groups[place]
    weights = {name.removeprefix(prefix): x for name, x in group.items() if name.startswith(prefix)}
    if part == "whole":
        weights = _as_open_clip_has_it(model, weights)
    elif place != _FIRST[0]:
        _refuse_other_text_tower(found, place, prefix)
    weights = {name: x for name, x in weights.items() if name not in _NEEDLESS}
    beside = sorted({name.split(".")[0] for name in group if not name.startswith(prefix)})
    entries = [name for name in found.entries if name not in (place.split(".")[:1] if place else group)]
    return Fitting(place or "state dict", prefix, part, weights, tuple(dict.fromkeys([*entries, *beside])))  # type: ignore[arg-type]


def misfits(tower: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Return the first reasons why weights do not fit a tower; empty if they fit."""
    own = tower.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)} and not {tuple(tensor.shape)}{_sizes(name, weights[name], tensor)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape and (weights[name].numel(), tensor.numel()) != (1, 1)
    ]
    missing = [f"{name} is missing" for name in own if name not in weights]
    unknown = [f"{name} is unknown" for name in weights if name not in own]
    wrong = [*shapes, *missing, *unknown]
    return "; ".join(wrong[:_SHOWN]) + (f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")


def put(tower: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load fitting weights of any precision into the tower, in the tower's own precision."""
    own = tower.state_dict()
    tower.load_state_dict({name: x.reshape(own[name].shape) for name, x in weights.items()})


def check_finite(weights: Mapping[str, Tensor], whose: str) -> None:
    """Raise a `UserError` that names the first tensor with NaN or infinity."""
    for name, tensor in weights.items():
        # A sum of finite numbers is finite, short of an overflow, and takes a fraction of the memory
        if tensor.is_floating_point() and not (tensor.sum().isfinite() or tensor.isfinite().all()):
            raise UserError(
                f"{whose} cannot be used: its weights hold NaN or infinity, first in {name}; the training that made "
                "them went astray, or the file is damaged: take an earlier checkpoint, or copy it again."
            )


def _sizes(name: str, found: Tensor, own: Tensor) -> str:
    """Return an explanation for users of a positional embedding of another length."""
    if not name.endswith("positional_embedding") or found.shape[1:] != own.shape[1:]:
        return ""
    return f" (made for another {'image size' if name in _IMAGE_POSITIONS else 'context length'})"


def _prefixes(group: Mapping[str, Tensor], names: set[str], is_whole: bool) -> Counter[str]:
    """Count, for each prefix, the tensors behind it with names of a tower; for a whole CLIP, not only the image
    tower's."""
    counts, complete = Counter[str](), set[str]()
    for name in group:
        parts = name.split(".")
        for i in range(len(parts)):
            if (rest := ".".join(parts[i:])) in names:
                prefix = ".".join([*parts[:i], ""]) if i else ""
                counts[prefix] += 1
                if not (is_whole and rest.startswith("visual.")):
                    complete.add(prefix)
    return Counter({prefix: count for prefix, count in counts.items() if prefix in complete})


def _as_open_clip_has_it(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert layouts of other codes and of older versions to open_clip's, where it can."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    weights = convert_state_dict(model, weights)
    return weights if hasattr(model, "positional_embedding") else convert_to_custom_text_state_dict(weights)


def _refuse_other_text_tower(found: WeightsFile, place: str, prefix: str) -> None:
    for where, group in found.groups.items():
        for name in group:
            is_inside = where == place and name.startswith(prefix)
            if name.endswith("ln_final.weight") and not is_inside and not _COPIES.search(f"{where}.{name}"):
                raise UserError(
                    f"{found.path} holds an image tower, and a text tower under names of its own ({name}) that would "
                    "be left out: save the whole CLIP's state dict, or the image tower's alone."
                )


def _tensors(content: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the entry, the name and the value of each tensor."""
    if isinstance(content, Mapping) and len(path) <= _DEEPEST:
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield ".".join(path), str(key), value
            else:
                yield from _tensors(value, (*path, str(key)))


def _check(file: Path) -> None:
    """Raise a `UserError` that says what a file is if it cannot be weights: downloads and clones leave such files."""
    if file.is_dir():
        raise UserError(about_folder(file))
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    with file.open("rb") as opened:
        head = opened.read(512)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        raise UserError(f"{file} is empty: copy or download it again.")
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a git-LFS pointer and not the weights: fetch them with git lfs pull.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"{file} is a web page and not weights: its download asked for a confirmation or a login; open the "
            "address in a browser and save what it offers."
        )
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file} is damaged: its end is missing; copy or download it again.")
        try:
            check_unpacked(file)
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise _damaged(file) from error


def about_folder(folder: Path) -> str:
    """Return advice about a folder that is named in place of a file of weights or of a model's folder."""
    if any((folder / name).is_file() for name in ("open_clip_config.json", "config.json")):
        return f"{folder} is a model's folder, which needs no import: name it as local-dir:{folder}."
    return f"{folder} is a folder: name the file of weights in it."


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged, or no file of weights that torch.save wrote; copy it again.")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises `UserError` if it is damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} is damaged: its end is missing, or it is no safetensors file; copy or download it again."
        ) from error


def read_pickle(file: Path, opened: io.BytesIO | None = None, harmless: Sequence[Any] = ()) -> Any:
    """Return what torch's own reader accepts as weights only. Raises `UserError` if it does not."""
    try:
        with torch.serialization.safe_globals([*_HARMLESS, *harmless]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown protocols; they raise an error anyway
            return torch.load(opened or file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise _no_weights(file) from error
        if asked[1].startswith("torch.nn.modules."):
            raise UserError(
                f"{file} is refused: it is a whole pickled model and not its weights; reading it would call {asked[1]} "
                "and whatever else it names, and nothing was run. If you trust its source, load it with its own code "
                "and save model.state_dict()."
            ) from error
        raise UserError(
            f"{file} is refused: reading it would call {asked[1]}, and rayclip reads weights only; nothing was run. If "
            "you trust its source, let its own code save the state dict alone."
        ) from error
    except MemoryError as error:
        raise UserError(f"{file} asks for more memory than there is: it is damaged, or too large here.") from error
    except Exception as error:  # whatever the parts of torch's reader raise for a damaged file
        raise _no_weights(file) from error


def _no_weights(file: Path) -> UserError:
    if _is_other_pickle(file):
        return UserError(
            f"{file} is a pickle that torch.save did not write (of numpy arrays, say): save the weights with "
            "torch.save or as safetensors."
        )
    return _damaged(file)


def _is_other_pickle(file: Path) -> bool:
    """Return whether the file is one pickle from end to end, which torch's files never are; it is scanned, not
    loaded."""
    try:
        with file.open("rb") as opened:
            names = [name for name, _, _ in pickletools.genops(opened) if name.name in ("PROTO", "STOP")]
            return len(names) == 2 and not opened.read(1)
    except (ValueError, EOFError, OSError, OverflowError, MemoryError):  # of lengths that it claims
        return False


class _Part:
    """Placeholder for a module of an archive: keeps its attributes, and none of its code."""


def _same(value: Any, *_: Any) -> Any:
    """Return `value`; replaces the functions with which an archive marks the type of a list."""
    return value


def _is_archive(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_archive(file: Path) -> tuple[dict[str, Tensor], bool | None]:
    """Return the tensors of a TorchScript archive by name, and whether its activation is QuickGELU if it has one.

    torch's reader of weights refuses archives as a whole, since loading one as a program runs it. Their tensors are
    pickled like those of any other file: the reader gets these alone, in a copy without the program, and each class of
    the program is replaced by one that does nothing.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).removesuffix("constants.pkl")
            pickled = archive.read(f"{root}data.pkl")
            names = {str(arg) for code, arg, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
            kept = {root + name for name in ("data.pkl", "version", ".data/version", "byteorder")}
            plain = io.BytesIO()
            with zipfile.ZipFile(plain, "w") as copy:
                for name in archive.namelist():
                    if name in kept or name.startswith(f"{root}data/"):
                        copy.writestr(name, archive.read(name))
    except (zipfile.BadZipFile, LookupError, ValueError, EOFError, OSError, RuntimeError, ArithmeticError) as error:
        raise _damaged(file) from error
    plain.seek(0)
    stand_ins: list[Any] = []
    for module, _, kind in (name.partition(" ") for name in names):
        if module.split(".")[0] == "__torch__":
            stand_ins.append((type(kind, (_Part,), {}), f"{module}.{kind}"))
        elif module == "torch.jit._pickle":
            stand_ins.append((_same, f"{module}.{kind}"))
    tensors, kinds = dict[str, Tensor](), set[str]()
    _collect(read_pickle(file, plain, stand_ins), "", tensors, kinds)
    activations = {"QuickGELU", "GELU"} & kinds
    return tensors, "QuickGELU" in activations if len(activations) == 1 else None


def _collect(part: Any, prefix: str, tensors: dict[str, Tensor], kinds: set[str], depth: int = 0) -> None:
    if depth > 64:  # an archive's modules are a tree; a crafted file may contain cycles
        return
    kinds.add(type(part).__name__)
    for name, value in (vars(part) if isinstance(part, _Part) else {}).items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, _Part):
            _collect(value, f"{prefix}{name}.", tensors, kinds, depth + 1)

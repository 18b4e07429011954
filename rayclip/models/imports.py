"""The field's checkpoints, read into a CLIP.

    vision_encoder_state_dict  `.pth.tar` of TeCoA's code and its kin (PMG-AFT, TGA-ZSR, SAFT): the image tower
    model                      MMCoA's code: the whole CLIP
    no wrapper                 RobustVLM's code (FARE, TeCoA): the image tower; or a whole CLIP's state dict

Names are OpenAI's in all of them, which are open_clip's too, with `module.` before them where they were saved through
`DataParallel`. Files are read as weights only: a pickle that wants to call anything is refused.
"""

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor, nn

from rayclip import __version__
from rayclip.models.clip import Clip, load_model
from rayclip.types import UserError

_WRAPPERS = ("vision_encoder_state_dict", "model")
_SHOWN = 3  # keys that an error names
# TeCoA's cosine schedule leaves numpy numbers in the optimizer's state, which torch does not read by itself. A number
# calls nothing. Under numpy 1 the function had the first name.
_NUMPY_NUMBERS: list[Any] = [
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """What a file holds.

    Attributes:
        layout: the wrapper's name, or `state dict`.
        part: whether the weights are the `image` tower's or the `whole` CLIP's.
        weights: under open_clip's names.
        left: entries of the file beside the weights, such as the optimizer's state.
        sha256: of the file.
    """

    layout: str
    part: Literal["image", "whole"]
    weights: dict[str, Tensor]
    left: tuple[str, ...]
    sha256: str


def read_foreign(file: Path) -> ForeignWeights:
    """Read a file in one of the layouts above.

    Raises:
        UserError: no such file, no file of torch's, one that would run code, or another layout.
    """
    content = _load(file)
    layout, entries, left = "state dict", content, []
    if isinstance(content, Mapping):
        for name in _WRAPPERS:
            if isinstance(content.get(name), Mapping):
                layout, entries, left = name, content[name], [str(key) for key in content if key != name]
                break
    if not _is_state_dict(entries):
        holds = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(
            f"{file} is in no layout that is known (vision_encoder_state_dict, model, or a bare state dict of an image "
            f"tower or a CLIP): it holds {holds or 'nothing'}."
        )
    weights = {name.removeprefix("module."): value for name, value in entries.items()}
    whole = any(name.startswith("visual.") for name in weights)
    return ForeignWeights(
        layout=layout, part="whole" if whole else "image", weights=weights, left=tuple(left), sha256=_sha256(file)
    )


def import_model(source: str, base: str | None, *, allow_gelu: bool = False) -> tuple[Clip, dict[str, Any]]:
    """A model with imported weights, and its lineage.

    Args:
        source: a file (`read_foreign`), or `hf-hub:ORG/NAME`, which needs no base.
        base: the model that the weights were fine-tuned from: it gives the architecture, the preprocessing, and the
            text tower where the file has none.
        allow_gelu: the base may have another activation than QuickGELU, OpenAI's.

    Raises:
        UserError: what `read_foreign` raises, weights that do not fit the base, or a base that is not OpenAI's kind.
    """
    if source.startswith("hf-hub:"):
        if base is not None:
            raise UserError(f"--base {base} has no use for {source}, which is a whole model: leave it out.")
        clip = load_model(source)
        return clip, {"rayclip": __version__, "imported": {"source": source, "fingerprint": clip.fingerprint()}}
    foreign = read_foreign(Path(source))
    if base is None:
        raise UserError(
            f"--base is missing: name the model that {source} was fine-tuned from, such as ViT-B-32:openai."
        )
    clip = load_model(base)
    if not (clip.config["model_cfg"].get("quick_gelu") or allow_gelu):
        raise UserError(
            f"--base {base} does not have QuickGELU, the activation of OpenAI's CLIP, which this field fine-tunes: "
            "name the model that it was fine-tuned from (ViT-B-32:openai), or add --allow-gelu if this is it."
        )
    lineage = {
        "source": Path(source).name,
        "sha256": foreign.sha256,
        "layout": foreign.layout,
        "part": foreign.part,
        "keys": len(foreign.weights),
        "left": list(foreign.left),
        "base": base,
        "base_fingerprint": clip.fingerprint(),
    }
    tower = clip.model if foreign.part == "whole" else clip.get_submodule("model.visual")
    _fit(tower, foreign.weights, source, base)
    return clip, {"rayclip": __version__, "imported": lineage}


def _fit(tower: nn.Module, weights: Mapping[str, Tensor], source: str, base: str) -> None:
    own = tower.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)} and not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    missing = [f"{name} is missing" for name in own if name not in weights]
    unknown = [f"{name} is unknown" for name in weights if name not in own]
    wrong = [*shapes, *missing, *unknown]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{source} does not fit --base {base}: {'; '.join(wrong[:_SHOWN])}{more}; name the model that it was "
            "fine-tuned from."
        )
    tower.load_state_dict(dict(weights))  # into fp32, whatever the file's precision


def _load(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UserError(
                f"{file} is refused: reading it would call {asked[1]}, and rayclip reads weights only; nothing was "
                "run. If you trust its source, let its own code save the state dict alone."
            ) from error
        raise _damaged(file) from error
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged, or no file of weights that torch.save wrote; copy it again.")


def _is_state_dict(entries: Any) -> bool:
    return (
        isinstance(entries, Mapping)
        and len(entries) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries.items())
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""Checkpoints as open_clip `local-dir:` folders: open_clip's two files, and `rayclip.json` with the lineage.

A learned prompt is one small file, and its lineage names the model that it was learned for.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayclip.models.clip import Clip
from rayclip.models.loading import CONFIG_FILE, WEIGHTS_FILE
from rayclip.models.prompts import Prompted
from rayclip.models.transformers_layout import TOKENIZER_FILES
from rayclip.models.weights import check_finite
from rayclip.models.zoo import find_published
from rayclip.store import Store
from rayclip.types import UserError

LINEAGE_FILE = "rayclip.json"
PROMPT_FILE = "prompt.safetensors"
# Files that a checkpoint may have; the lineage is copied last
FILES = (PROMPT_FILE, WEIGHTS_FILE, CONFIG_FILE, *TOKENIZER_FILES, LINEAGE_FILE)


def save_checkpoint(clip: Clip, folder: Path, lineage: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write `clip` so that `load_model("local-dir:FOLDER")` and plain open_clip load the same function.

    Of a `Prompted` model only the prompt is written; `load_model("prompted:FOLDER")` loads the same function. A folder
    with `rayclip.json` is complete (`whole_folder`).
    """
    state, file = clip.model.state_dict(), WEIGHTS_FILE
    with whole_folder(folder) as partial:
        if isinstance(clip, Prompted):
            state, file = {clip.kind: clip.learned}, PROMPT_FILE
            lineage = {**lineage, "prompt": clip.describe()}
        else:
            (partial / CONFIG_FILE).write_text(json.dumps(clip.config, indent=1) + "\n")
            save_tokenizer(clip, partial)
        write_weights(state, partial / file, dtype)
        (partial / LINEAGE_FILE).write_text(json.dumps(dict(lineage), indent=1) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder`; its files are moved in when all are complete, the lineage last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == LINEAGE_FILE):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(
    state: Mapping[str, Tensor],
    file: Path,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors as safetensors."""
    tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in state.items()}
    save_file(tensors, file, metadata)
    file.chmod(0o644)  # safetensors writes 0600, which the other users of a cluster cannot read


def save_tokenizer(clip: Clip, folder: Path) -> bool:
    """Write the files of a tokenizer that is not CLIP's own; return whether it is one. open_clip reads it from beside a
    checkpoint's configuration."""
    if not clip.config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name"):
        return False
    clip._tokenizer.save_pretrained(folder)
    return True


@torch.no_grad()
def restore(clip: Clip, folder: Path) -> None:
    """Load the weights of a checkpoint into `clip`, a model of the same architecture; for a prompted one, its prompt.

    Raises:
        UserError: the checkpoint contains NaN or infinity.
    """
    saved = load_file(folder / (PROMPT_FILE if isinstance(clip, Prompted) else WEIGHTS_FILE))
    check_finite(saved, f"the checkpoint in {folder}")
    if isinstance(clip, Prompted):
        clip.learned.copy_(saved[clip.kind])
    else:
        clip.model.load_state_dict(saved)


def read_lineage(folder: Path | str) -> dict[str, Any] | None:
    """Return the lineage of a complete checkpoint, in a folder or at a URI; None if there is none.

    Raises:
        UserError: the lineage is damaged.
    """
    store = Store(str(folder))
    try:
        return store.read_json(LINEAGE_FILE, dict)
    except UserError as error:
        raise UserError(f"{store.root}/{LINEAGE_FILE} is damaged: copy it again.") from error


def model_record(spec: str, label: str | None = None) -> dict[str, Any]:
    """Return a model's entry in results: its name, its label in tables, and the origin of its weights if that is
    known."""
    kind, _, path = spec.partition(":")
    lineage = read_lineage(path) if kind in ("local-dir", "prompted") else None
    lineage = find_published(spec).lineage() if kind == "zoo" else lineage
    return {"model": spec, "label": label, "lineage": lineage}

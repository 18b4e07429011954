"""Checkpoints as open_clip `local-dir:` folders: two files of open_clip's, and `rayclip.json` with the lineage.

A learned prompt is one small file, and its lineage names the model that it stands on.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rayclip.models.clip import CONFIG_FILE, WEIGHTS_FILE, Clip, load_model
from rayclip.models.prompts import KINDS, Prompted
from rayclip.types import UserError

LINEAGE_FILE = "rayclip.json"
PROMPT_FILE = "prompt.safetensors"
FILES = (PROMPT_FILE, WEIGHTS_FILE, CONFIG_FILE, LINEAGE_FILE)  # that a checkpoint may have, the last one last


def save_checkpoint(clip: Clip, folder: Path, lineage: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write `clip` so that `load_model("local-dir:FOLDER")` and plain open_clip give back the same function.

    Of a `Prompted` one only the prompt is written; `load_model("prompted:FOLDER")` gives back the same function.
    The files are written beside the folder and moved in when complete, the lineage last: a folder with
    `rayclip.json` is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    state, file = clip.model.state_dict(), WEIGHTS_FILE
    if isinstance(clip, Prompted):
        state, file = {clip.kind: clip.learned}, PROMPT_FILE
        lineage = {**lineage, "prompt": clip.describe()}
    else:
        (partial / CONFIG_FILE).write_text(json.dumps(clip.config, indent=1) + "\n")
    save_file({name: x.detach().to("cpu", dtype).contiguous() for name, x in state.items()}, partial / file)
    (partial / file).chmod(0o644)  # safetensors writes 0600, which the other users of a cluster cannot read
    (partial / LINEAGE_FILE).write_text(json.dumps(dict(lineage), indent=1) + "\n")
    folder.mkdir(exist_ok=True)
    for name in (name for name in FILES if (partial / name).exists()):
        os.replace(partial / name, folder / name)
    partial.rmdir()


@torch.no_grad()
def restore(clip: Clip, folder: Path) -> None:
    """Give `clip` the weights of a checkpoint of a model like it, or what a prompted one learned."""
    if isinstance(clip, Prompted):
        clip.learned.copy_(load_file(folder / PROMPT_FILE)[clip.kind])
    else:
        clip.model.load_state_dict(load_file(folder / WEIGHTS_FILE))


def load_prompted(spec: str, device: torch.device | str = "cpu") -> Clip:
    """A learned prompt on its model, `prompted:DIR`.

    Raises:
        UserError: no prompt there, or its model is not where it was, or not what it was.
    """
    folder = Path(spec.removeprefix("prompted:"))
    about = (read_lineage(folder) or {}).get("prompt")
    if about is None or about.get("kind") not in KINDS:
        raise UserError(f"model '{spec}': {folder} holds no learned prompt; give a folder that advpt or vp wrote.")
    try:
        base = load_model(about["base"], device)
    except UserError as error:
        raise UserError(f"the prompt in {folder} stands on a model that is not there: {error}") from error
    if base.fingerprint() != about["base_fingerprint"]:
        raise UserError(
            f"the prompt in {folder} was learned on another model than '{about['base']}' is now: bring that back."
        )
    try:
        learned = load_file(folder / PROMPT_FILE)[about["kind"]]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"model '{spec}': {PROMPT_FILE} is missing or damaged; copy it again.") from error
    clip = KINDS[about["kind"]](base, learned)
    clip.spec = spec
    return clip.eval()


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage of a complete checkpoint, None where there is none."""
    try:
        return json.loads((folder / LINEAGE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None

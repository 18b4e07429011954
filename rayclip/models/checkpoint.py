"""Checkpoints as open_clip `local-dir:` folders: two files of open_clip's, and `rayclip.json` with the lineage."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayclip.models.clip import CONFIG_FILE, WEIGHTS_FILE, Clip

LINEAGE_FILE = "rayclip.json"


def save_checkpoint(clip: Clip, folder: Path, lineage: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write `clip` so that `load_model("local-dir:FOLDER")` and plain open_clip give back the same function.

    The files are written beside the folder and moved in when complete, the lineage last: a folder with
    `rayclip.json` is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in clip.model.state_dict().items()}
    save_file(state, partial / WEIGHTS_FILE)
    (partial / WEIGHTS_FILE).chmod(0o644)  # safetensors writes 0600, which the other users of a cluster cannot read
    (partial / CONFIG_FILE).write_text(json.dumps(clip.config, indent=1) + "\n")
    (partial / LINEAGE_FILE).write_text(json.dumps(dict(lineage), indent=1) + "\n")
    folder.mkdir(exist_ok=True)
    for name in (WEIGHTS_FILE, CONFIG_FILE, LINEAGE_FILE):
        os.replace(partial / name, folder / name)
    partial.rmdir()


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage of a complete checkpoint, None where there is none."""
    try:
        return json.loads((folder / LINEAGE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None

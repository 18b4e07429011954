"""Describe in a checkpoint, in `rayclip.json`, the run that made it."""

from typing import Any

import torch

from rayclip import __version__
from rayclip.data import ImageSet
from rayclip.models import Clip
from rayclip.models.exact import has_batch_norm
from rayclip.training.config import TrainConfig


def lineage(config: TrainConfig, data: ImageSet, clip: Clip, step: int, total_steps: int) -> dict[str, Any]:
    """Return the contents of a checkpoint's `rayclip.json`; the checkpoint is final if `step` equals `total_steps`.

    Device, torch and BatchNorm are facts for readers, and no part of its identity.
    """
    on_gpu = clip.device.type == "cuda"
    return {
        "rayclip": __version__,
        "step": step,
        "total_steps": total_steps,
        "weights": f"moving average, decay {config.ema:g}" if config.ema else "last step",
        "digest": config.digest(),
        "config": config.describe(),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "images": len(data),
            "class_names": list(data.class_names),
        },
        "device": torch.cuda.get_device_name(clip.device) if on_gpu else clip.device.type,
        "torch": str(torch.__version__),
        **({"batch_norm": "statistics of the base model, frozen"} if has_batch_norm(clip) else {}),
    }

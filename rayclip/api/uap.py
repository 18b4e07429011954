"""Make a universal perturbation (`attacks.uap`)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rayclip.attacks.uap import Objective, ascend_together, save_perturbation
from rayclip.data import batch_pixels, open_data
from rayclip.data.sampling import EpochSampler
from rayclip.evaluation import chosen_positions
from rayclip.models import TEMPLATE, ZeroShot, load_model


def make_perturbation(
    model: str,
    data: str,
    out: Path,
    *,
    eps: float,
    step: float,
    epochs: int = 2,
    batch: int = 64,
    limit: int | None = None,
    template: str | None = None,
    objective: Objective = "embedding",
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Write the universal perturbation of a model on the train images of a data set; return what was done, in words.

    Args:
        eps, step: in pixel units.
        limit: use this many images, evenly spaced.
        device: `auto`, or as torch names it.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    images = open_data(data, "train")
    victim = ZeroShot(load_model(model, where), images.class_names, template or TEMPLATE)
    positions, size = chosen_positions(len(images), limit), victim.clip.image_size
    sampler = EpochSampler(count=len(positions), batch_size=batch, seed=seed)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for places in sampler.global_batches(epoch):
            chosen = positions[places].tolist()
            pixels = batch_pixels(images, chosen, "native" if images.native_size else "model", size)
            yield pixels.to(where).float() / 255, torch.from_numpy(images.labels[chosen]).to(where)

    shape = tuple(next(batches(0))[0].shape[1:])
    delta = ascend_together(victim, batches, shape, eps=eps, step=step, epochs=epochs, seed=seed, objective=objective)
    save_perturbation(delta, out)
    return f"{shape[1]}×{shape[2]} pixels, {epochs} epochs of {len(positions)} images of '{images.name}'"

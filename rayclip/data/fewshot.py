"""k-shot subsets: k images of each class, fixed by the seed and independent of the cluster."""

from typing import Any

import numpy as np

from rayclip.data.images import ImageSet
from rayclip.types import UserError


def few_shot(data: ImageSet, shots: int | None, seed: int) -> ImageSet:
    """Return a subset of `shots` random images per class; None or 0 keeps everything ("full").

    Subsets are nested: the 1-shot image of a class is among its 5-shot images of the same seed.

    Raises:
        UserError: a class has fewer images than asked for.
    """
    if not shots:
        return data
    chosen = []
    for label, name in enumerate(data.class_names):
        members = np.flatnonzero(data.labels == label)
        if len(members) < shots:
            raise UserError(
                f"--shots {shots} is more than class '{name}' of '{data.name}' has ({len(members)} images): "
                "ask for fewer shots or full."
            )
        # One counter-based stream per class, so that a draw depends on (seed, class) alone.
        order = np.random.Generator(np.random.Philox(key=[seed, label])).permutation(len(members))
        chosen.append(members[order[:shots]])
    return data.subset(np.sort(np.concatenate(chosen)))


def draw_record(drawn: ImageSet, shots: int, seed: int) -> dict[str, Any]:
    """Return a record of a subset's images by class, for people and for later runs that need the same images."""
    return {
        "data": drawn.name,
        "fingerprint": drawn.fingerprint,
        "shots": shots,
        "seed": seed,
        "ids": [
            {"class": name, "ids": drawn.ids[drawn.labels == label].tolist()}
            for label, name in enumerate(drawn.class_names)
        ],
    }

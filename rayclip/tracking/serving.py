"""Serve a checkpoint with MLflow: the model that `mlflow.pyfunc` loads and `mlflow models serve` serves.

An MLflow model names this module and contains the checkpoint's files, so that nothing is unpickled.

Shapes: N images, K classes.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError

from rayclip.data.images import Resize, batch_pixels
from rayclip.models import ZeroShot, load_model
from rayclip.models.checkpoint import PROMPT_FILE, read_lineage
from rayclip.models.exact import use_exact_fp32
from rayclip.models.zeroshot import TEMPLATE
from rayclip.names import check_template
from rayclip.types import UserError

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 64


class ServedModel:
    """A zero-shot classifier from a checkpoint, with the interface of an MLflow model. A `UserError` tells what is
    missing."""

    def __init__(self, folder: Path) -> None:
        use_exact_fp32()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = "prompted" if (folder / PROMPT_FILE).exists() else "local-dir"
        self.clip = load_model(f"{kind}:{folder}", self.device)
        self.class_names, self.template = defaults(folder)
        self._last: tuple[tuple[Sequence[str], str], ZeroShot] | None = None

    def predict(self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Classify images.

        Args:
            model_input: N rows with a column `image`, the bytes of a PNG, JPEG or WebP file (base64 in JSON).
            params: `class_names` (K of them; by default those of the training data) and `template`, with {} for a name.

        Returns:
            N rows with `label`, one of the class names; `probability`, its softmax probability; and `probabilities`,
            all K in the order of the class names.

        Raises:
            UserError: no class names, a template without {}, or an image that cannot be read.
        """
        import pandas as pd

        params = params or {}
        names = tuple(str(name) for name in params.get("class_names", ())) or self.class_names
        template = str(params.get("template") or self.template)
        if not names:
            raise UserError("this checkpoint does not know its classes: send the parameter 'class_names'.")
        check_template(template)
        classifier = self._classifier(names, template)
        files = _Files(model_input["image"].tolist())
        found = [torch.empty(0, len(names))]
        with torch.no_grad():
            for start in range(0, len(files.contents), _BATCH):
                positions = range(start, min(start + _BATCH, len(files.contents)))
                pixels = batch_pixels(files, positions, "model", self.clip.image_size).to(self.device) / 255
                found.append(classifier(pixels).float().softmax(dim=-1).cpu())
        probability_NK = torch.cat(found)
        best = probability_NK.max(dim=-1)
        labels = [names[i] for i in best.indices.tolist()]
        return pd.DataFrame(
            {"label": labels, "probability": best.values.tolist(), "probabilities": probability_NK.tolist()}
        )

    def _classifier(self, names: tuple[str, ...], template: str) -> ZeroShot:
        """Return the classifier of these classes; its class embeddings are kept for the next request."""
        if self._last is None or self._last[0] != (names, template):
            self._last = (names, template), ZeroShot(self.clip, names, template)
        return self._last[1]


class _Files:
    """Images (`data.images.Images`) from encoded files in memory."""

    name = "the request"
    resize: Resize = "auto"

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.contents = contents

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        found = []
        for i in positions:
            try:
                found.append(Image.open(io.BytesIO(self.contents[i])).convert("RGB"))
            except (UnidentifiedImageError, OSError, TypeError) as error:
                raise UserError(f"image {i} of the request cannot be read: send the bytes of an image file.") from error
        return found


def defaults(folder: Path) -> tuple[tuple[str, ...], str]:
    """Return the class names and the template that a checkpoint was trained with."""
    lineage = read_lineage(folder) or {}
    names = (lineage.get("data") or {}).get("class_names") or ()
    return tuple(names), (lineage.get("config") or {}).get("template") or TEMPLATE


def _load_pyfunc(path: str) -> ServedModel:
    """Load the model from its folder; MLflow requires this name."""
    return ServedModel(Path(path))

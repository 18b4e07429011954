"""Imports the field's checkpoints as rayclip's own: their weights in the model that they were fine-tuned from."""

from pathlib import Path
from typing import Any

from rayclip import __version__
from rayclip.models.clip import Clip
from rayclip.models.loading import put_matching
from rayclip.models.opening import load_model
from rayclip.models.weights import read_weights, sha256
from rayclip.types import UserError


def import_model(source: str, base: str | None, *, allow_gelu: bool = False) -> tuple[Clip, dict[str, Any]]:
    """Return a model with imported weights, and its lineage.

    Args:
        source: a file (`weights.read_weights`), or `hf-hub:ORG/NAME`, which needs no base.
        base: the model that the weights were fine-tuned from: it gives the architecture, the preprocessing, and the
            text tower if the file has none.
        allow_gelu: the base may have another activation than QuickGELU, OpenAI's.

    Raises:
        UserError: what `read_weights` and `match` raise, weights that do not fit the base or contain NaN, or a base
            with another activation than theirs.
    """
    if source.startswith("hf-hub:"):
        if base is not None:
            raise UserError(f"--base {base} has no use for {source}, which is a whole model: leave it out.")
        clip = load_model(source)
        return clip, {"rayclip": __version__, "imported": {"source": source, "fingerprint": clip.fingerprint()}}
    found = read_weights(Path(source))
    if base is None:
        raise UserError(
            f"--base is missing: name the model that {source} was fine-tuned from, such as ViT-B-32:openai."
        )
    clip = load_model(base)
    _check_activation(source, base, bool(clip.config["model_cfg"].get("quick_gelu")), found.quick_gelu, allow_gelu)
    base_fingerprint = clip.fingerprint()
    fitting = put_matching(found, clip.model, f"--base {base}")
    lineage = {
        "source": Path(source).name,
        "sha256": sha256(found.path),
        "layout": fitting.layout,
        "prefix": fitting.prefix,
        "part": fitting.part,
        "keys": len(fitting.weights),
        "left": list(fitting.left),
        "base": base,
        "base_fingerprint": base_fingerprint,
    }
    return clip, {"rayclip": __version__, "imported": lineage}


def _check_activation(source: str, base: str, is_quick: bool, stated: bool | None, allow_gelu: bool) -> None:
    """Raise a `UserError` unless the base has the file's activation: the one stated in the file, else QuickGELU unless
    the user says GELU."""
    if stated is not None and stated != is_quick:
        raise UserError(
            f"{source} says that its activation is {'QuickGELU' if stated else 'GELU'}, which --base {base} does not "
            "have: name the model that it was fine-tuned from."
        )
    if not (is_quick or allow_gelu or stated is False):
        raise UserError(
            f"--base {base} does not have QuickGELU, the activation of OpenAI's CLIP, which this field fine-tunes: "
            "name the model that it was fine-tuned from (ViT-B-32:openai), or add --allow-gelu if this is it."
        )

"""CLIP in one wrapper that takes pixels in [0, 1] and tokens, and returns embeddings."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclip.models.clip import Clip
    from rayclip.models.fast import Precision, fast_copy
    from rayclip.models.opening import load_model
    from rayclip.models.zeroshot import TEMPLATE, ZeroShot, class_prompts

__all__ = ["TEMPLATE", "Clip", "Precision", "ZeroShot", "class_prompts", "fast_copy", "load_model"]
_MODULES = {"clip": "Clip", "fast": "Precision fast_copy", "opening": "load_model"}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import torch only with what needs it: the zoo (`models.zoo`) does not."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'zeroshot')}"), name)

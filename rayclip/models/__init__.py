"""CLIP in one wrapper that takes pixels in [0, 1] and tokens, and returns embeddings."""

from rayclip.models.clip import Clip
from rayclip.models.fast import Precision, fast_copy
from rayclip.models.opening import load_model
from rayclip.models.zeroshot import TEMPLATE, ZeroShot, class_prompts

__all__ = ["TEMPLATE", "Clip", "Precision", "ZeroShot", "class_prompts", "fast_copy", "load_model"]

"""CLIP in one wrapper that takes pixels in [0, 1] and tokens, and returns embeddings."""

from rayclip.models.clip import Clip, load_model
from rayclip.models.fast import Precision, fast_copy
from rayclip.models.zeroshot import TEMPLATE, ZeroShot, class_prompts

__all__ = ["TEMPLATE", "Clip", "Precision", "ZeroShot", "class_prompts", "fast_copy", "load_model"]

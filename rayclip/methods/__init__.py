"""Training methods: one file each, a loss and the attack it trains against."""

from rayclip.methods.base import SMALL_BELOW, SMALL_MODEL, Batch, ClassTexts, Method, Original, Recipe
from rayclip.methods.registry import METHODS, make_method

__all__ = [
    "METHODS",
    "SMALL_BELOW",
    "SMALL_MODEL",
    "Batch",
    "ClassTexts",
    "Method",
    "Original",
    "Recipe",
    "make_method",
]

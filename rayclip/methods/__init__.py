"""Training methods: one file each, a loss and the attack it trains against."""

from rayclip.methods.base import Batch, ClassTexts, Method, Recipe
from rayclip.methods.registry import METHODS, make_method

__all__ = ["METHODS", "Batch", "ClassTexts", "Method", "Recipe", "make_method"]

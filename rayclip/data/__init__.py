"""Labelled image sets, image-caption pairs: bundled digits, prepared data sets, Parquet in the Hugging Face layout."""

from rayclip.data.fewshot import few_shot
from rayclip.data.images import ImageSet, Resolution, batch_pixels
from rayclip.data.opening import open_data
from rayclip.data.pairs import PairSet, open_pairs

__all__ = ["ImageSet", "PairSet", "Resolution", "batch_pixels", "few_shot", "open_data", "open_pairs"]

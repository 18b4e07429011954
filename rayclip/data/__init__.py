"""Labelled image sets: the bundled digits, prepared data sets, and any Parquet in the Hugging Face layout."""

from rayclip.data.fewshot import few_shot
from rayclip.data.images import ImageSet, Resolution, batch_pixels
from rayclip.data.opening import open_data

__all__ = ["ImageSet", "Resolution", "batch_pixels", "few_shot", "open_data"]

"""Labelled images: the bundled digits, the papers' data sets once prepared, any Parquet in the Hugging Face layout."""

from rayclip.data.fewshot import few_shot
from rayclip.data.images import ImageSet, Resolution, batch_pixels
from rayclip.data.manifest import Names
from rayclip.data.opening import locate, open_data

__all__ = ["ImageSet", "Names", "Resolution", "batch_pixels", "few_shot", "locate", "open_data"]

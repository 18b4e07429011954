"""Labelled images and image-caption pairs: the bundled digits, the papers' data sets, the user's own Parquet files."""

from rayclip.data.images import ImageSet, Resolution, batch_pixels
from rayclip.data.manifest import Names
from rayclip.data.opening import locate, open_data, open_pairs
from rayclip.data.parquet import PairSet
from rayclip.data.registry import DatasetInfo
from rayclip.data.sampling import few_shot

__all__ = [
    "DatasetInfo",
    "ImageSet",
    "Names",
    "PairSet",
    "Resolution",
    "batch_pixels",
    "few_shot",
    "locate",
    "open_data",
    "open_pairs",
]

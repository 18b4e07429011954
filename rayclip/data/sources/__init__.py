"""Sources of data sets: torchvision, the Hugging Face hub, folders, Parquet, WebDataset, other packages."""

from rayclip.data.sources.base import Record, Source

__all__ = ["Record", "Source"]

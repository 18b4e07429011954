"""The data sets of the papers, one declarative row each.

Split sizes are those that the sets' authors published; `evaluated` is the split that SAFT, TTC and MMCoA report on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Resize = Literal["square", "crop"]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set's place on the Hugging Face hub.

    Attributes:
        repo: data set id.
        form: CLIP_benchmark's WebDataset form, or Parquet files.
        splits: our split names -> the repository's.
        counts: where the repository's splits differ in size from the published ones.
        note: how it differs from what the papers evaluate, one sentence.
    """

    repo: str
    form: Literal["webdataset", "parquet"]
    splits: Mapping[str, str]
    counts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """torchvision's class of a data set.

    Attributes:
        cls: name in `torchvision.datasets`.
        splits: our split names -> keyword arguments of the class.
        download: whether the class can fetch the files by itself.
    """

    cls: str
    splits: Mapping[str, Mapping[str, Any]]
    download: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One data set.

    Attributes:
        name: on the command line and in tables.
        title: for people.
        splits: published number of images of each split.
        evaluated: the split the papers report on.
        classes: how many; 0 for image-caption data.
        curated: key of `classnames.json`; None where CLIP's names are the raw ones.
        resize: at resolution `model`: `square` to the input size, or `crop` (shorter side, then the centre).
        torchvision, hub: where it comes from.
        folder: published folder form that `--source folder` reads.
        default: the source used where none is named.
    """

    name: str
    title: str
    splits: Mapping[str, int]
    evaluated: str
    classes: int
    resize: Resize
    licence: str
    citation: str
    curated: str | None = None
    torchvision: Torchvision | None = None
    hub: Hub | None = None
    folder: Literal["imagefolder", "imagenet", "tiny_imagenet", "captions"] = "imagefolder"
    default: Literal["torchvision", "hub", "bundled"] = "hub"
    note: str = ""


ROWS: Mapping[str, Row] = {}
MMCOA_15: tuple[str, ...] = ()

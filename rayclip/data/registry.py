"""Everything that is known of a data set before it is prepared: `datasets.toml`, and what other packages offer."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from rayclip.data.labels import fold_name, spell_alike
from rayclip.data.spec import COOP
from rayclip.names import Registry
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.data.images import ImageSet
    from rayclip.data.sources.base import Source


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set's repository on the Hugging Face hub.

    Attributes:
        repo: data set id.
        form: CLIP_benchmark's WebDataset form, or Parquet files.
        splits: our split names -> the repository's.
        counts: sizes of the splits that differ from the published ones.
        classes, curated: given if they differ from the data set's.
        note: how it differs from what the papers evaluate, one sentence.
    """

    repo: str
    form: Literal["webdataset", "parquet"]
    splits: Mapping[str, str]
    counts: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    curated: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """torchvision's class for a data set.

    Attributes:
        cls: name in `torchvision.datasets`.
        splits: our split names -> keyword arguments of the class.
        needs: the files that the class expects in its folder, for messages.
        download: whether the class can download the files itself.
    """

    cls: str
    splits: Mapping[str, Mapping[str, Any]]
    needs: str
    download: bool = True


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A data set: its protocol, and where to take it from.

    Attributes:
        name: on the command line and in tables.
        title: for people.
        splits: published number of images in each split.
        evaluated: the split the papers report on.
        classes: number of classes; 0 for image-caption data.
        resize: at resolution `model`: `square` to the input size, or `crop` (shorter side, then the centre).
        licence: the known terms, in a few words.
        citation: authors, year, title, venue.
        curated: key of `classnames.json`; None if CLIP's names are the cleaned raw names.
        cleaning: regular expressions and their replacements, applied in order when names are cleaned.
        torchvision, hub: published sources to take it from.
        folder: published folder form that `--source folder` reads.
        coop: sizes of CoOp's splits (Zhou et al. 2022), if it has some of its own: they are the data set `NAME#coop`.
        coop_classes: number of classes there, if it differs.
        open: opens a split that needs no preparing, such as one that comes with a package.
        source: opens a source of its own; takes the splits wanted, None for all.
        default: the source used if none is named; None for `source`, or else the hub.
        note: a remark for users, one sentence.
    """

    name: str
    title: str
    splits: Mapping[str, int]
    evaluated: str
    classes: int
    resize: Literal["square", "crop"]
    licence: str
    citation: str
    curated: str | None = None
    cleaning: Sequence[Sequence[str]] = (("_", " "),)
    torchvision: Torchvision | None = None
    hub: Hub | None = None
    folder: Literal["imagefolder", "imagenet", "tiny_imagenet", "captions", "coop"] = "imagefolder"
    coop: Mapping[str, int] | None = None
    coop_classes: int | None = None
    open: Callable[[str], "ImageSet"] | None = None
    source: Callable[[Sequence[str] | None], "Source"] | None = None
    default: Literal["torchvision", "hub", "folder"] | None = None
    note: str = ""

    @property
    def taken_from(self) -> str:
        """Return where it is taken from unless people say otherwise: `torchvision`, `hub`, `bundled`, `package`."""
        if self.open is not None:
            return "bundled"
        return self.default or ("package" if self.source is not None else "hub")

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the functions, as JSON values."""
        described = {key: value for key, value in asdict(self).items() if key not in ("open", "source")}
        return {**described, "default": self.taken_from}


def _open_digits(split: str) -> "ImageSet":
    from rayclip.data.digits import Digits

    return Digits(split)


def _split_by_coop(row: DatasetInfo) -> DatasetInfo:
    """Return a data set in CoOp's splits, which has its images and the class names of its list."""
    return replace(
        row,
        name=row.name + COOP,
        title=f"{row.title} in CoOp's split",
        splits=row.coop or {},
        evaluated="test",
        classes=row.coop_classes or row.classes,
        citation=f"{row.citation}; split of Zhou et al. 2022, Learning to Prompt for Vision-Language Models, IJCV",
        curated=None,
        cleaning=(("_", " "),),
        torchvision=None,
        hub=None,
        folder="coop",
        coop=None,
        default="folder",
        note="Read from CoOp's list, split_zhou_*.json, in the folder of the images.",
    )


def _published() -> list[DatasetInfo]:
    """Return the data sets of `datasets.toml`, and those of them that CoOp splits in its own way."""
    table = tomllib.loads(resources.files("rayclip.data").joinpath("datasets.toml").read_text("utf-8"))
    kinds: dict[str, type] = {"hub": Hub, "torchvision": Torchvision}
    rows = [
        DatasetInfo(
            name=name,
            open=_open_digits if name == "digits" else None,
            **{key: kinds[key](**value) if key in kinds else value for key, value in row.items()},
        )
        for name, row in table.items()
    ]
    return rows + [_split_by_coop(row) for row in rows if row.coop]


_PUBLISHED = _published()
DATASETS: Registry[DatasetInfo] = Registry("data set", "datasets", DatasetInfo, _PUBLISHED)
ZERO_SHOT_16 = tuple(one.name for one in _PUBLISHED[:16])  # the zero-shot targets of SAFT and TTC

# MMCoA's 15 data sets, in the order of the columns of its tables II and III.
MMCOA_15 = tuple(
    "imagenet cifar10 cifar100 tiny_imagenet stl10 sun397 food101 oxford_pets flowers102 dtd eurosat fgvc_aircraft "
    "country211 caltech101 caltech256".split()
)


def find(name: str) -> DatasetInfo:
    """Return the data set of that name, ours or another package's. Raises `UserError`, which suggests the nearest."""
    if name in DATASETS:
        return DATASETS[name]
    offered = [one for one in DATASETS.values() if "coop" in name or not one.name.endswith(COOP)]
    by_plain = {fold_name(text): one.name for one in offered for text in (one.name, one.title)}
    asked = fold_name(name)
    near = [by_plain[asked]] if asked in by_plain else []
    near += [known for text, known in by_plain.items() if len(asked) > 2 and (asked in text or text in asked)]
    near += [by_plain[match] for match in difflib.get_close_matches(asked, by_plain, n=3, cutoff=0.6)]
    nearest = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(DATASETS)}."
    raise UserError(f"no data set '{name}': {hint}")


def curated_names(
    row: DatasetInfo, raw_names: Sequence[str], source_kind: str, label_keys: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the class names in label order, in the curated spelling for CLIP's prompts; empty for image-caption data.

    Labels keep their meaning: names are matched by key (`Source.label_keys`) or by spelling, and by position only if
    the source, of kind `source_kind`, is known to have the published label order. If nothing matches, the cleaned raw
    names are used. Raises `UserError`: the numbers of classes of the source and the data set differ."""
    if row.classes == 0:
        return ()
    on_hub = row.hub if source_kind == "hub" else None
    expected = (on_hub and on_hub.classes) or row.classes
    if len(raw_names) != expected:
        raise UserError(
            f"{row.title} has {expected} classes, but the source holds {len(raw_names)}: take the complete data set."
        )
    key = (on_hub and on_hub.curated) or row.curated
    if key is not None:
        names = _curated()[key]
        if isinstance(names, dict):
            for keys in (label_keys, raw_names):
                if names.keys() == set(keys):
                    return tuple(names[k] for k in keys)
        in_order = tuple(names.values()) if isinstance(names, dict) else tuple(names)
        if isinstance(names, dict) and set(raw_names) == set(map(str, range(expected))):  # folders numbered by label
            return tuple(in_order[int(number)] for number in raw_names)
        if spelled := spell_alike(raw_names, in_order):
            return spelled
        upload_keeps_order = on_hub is not None and on_hub.form == "webdataset"
        if source_kind == "torchvision" or upload_keeps_order:
            return in_order
    return tuple(clean(row, name) for name in raw_names)


def clean(row: DatasetInfo, name: str) -> str:
    """Apply the row's replacements to a raw class name, and collapse whitespace."""
    for pattern, replacement in row.cleaning:
        name = re.sub(pattern, replacement, name)
    return " ".join(name.split())


@cache
def _curated() -> dict[str, list[str] | dict[str, str]]:
    """For each data set a list in label order, or an object, in label order too, from folder or WordNet id to name."""
    text = resources.files("rayclip.data").joinpath("classnames.json").read_text(encoding="utf-8")
    return dict(json.loads(text))

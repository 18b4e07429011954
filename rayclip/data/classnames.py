"""Curated class names for CLIP's prompts.

For each data set `classnames.json` holds a list in label order, or an object, also in label order, that maps the class
keys of the published files (folder name, WordNet id, country code) to names. ImageNet's list has 'missile' and
'sunglasses' twice.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

from rayclip.data.labels import fold_name
from rayclip.data.registry import DatasetInfo
from rayclip.types import UserError


def curated_names(
    row: DatasetInfo, raw_names: Sequence[str], source_kind: str, label_keys: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the class names in label order, in the curated spelling for CLIP's prompts; empty for image-caption data.

    Labels keep their meaning: names are matched by key (`Source.label_keys`) or by spelling, and by position only if
    the source, of kind `source_kind`, is known to have the published label order. If nothing matches, the cleaned raw
    names are used.

    Raises:
        UserError: the numbers of classes of the source and the data set differ.
    """
    if row.classes == 0:
        return ()
    on_hub = row.hub if source_kind == "hub" else None
    expected = (on_hub and on_hub.classes) or row.classes
    if len(raw_names) != expected:
        raise UserError(
            f"{row.title} has {expected} classes, but the source holds {len(raw_names)}: take the complete data set."
        )
    key = (on_hub and on_hub.curated) or row.curated
    if key is None:
        return tuple(clean(row, name) for name in raw_names)
    names = _curated()[key]
    if isinstance(names, dict):
        for keys in (label_keys, raw_names):
            if names.keys() == set(keys):
                return tuple(names[k] for k in keys)
    in_order = tuple(names.values()) if isinstance(names, dict) else tuple(names)
    spelled = {fold_name(name): name for name in in_order}
    if len(spelled) == expected and spelled.keys() == {fold_name(name) for name in raw_names}:
        return tuple(spelled[fold_name(name)] for name in raw_names)
    upload_keeps_order = on_hub is not None and on_hub.form == "webdataset"
    sorted_keys = isinstance(names, list) and bool(label_keys)  # ImageNet: sorted WordNet ids
    if source_kind == "torchvision" or upload_keeps_order or sorted_keys:
        return in_order
    return tuple(clean(row, name) for name in raw_names)


def clean(row: DatasetInfo, name: str) -> str:
    """Apply the row's replacements to a raw class name, and collapse whitespace."""
    for pattern, replacement in row.cleaning:
        name = re.sub(pattern, replacement, name)
    return " ".join(name.split())


@cache
def _curated() -> dict[str, list[str] | dict[str, str]]:
    text = resources.files("rayclip.data").joinpath("classnames.json").read_text(encoding="utf-8")
    return dict(json.loads(text))

"""Restricts which models a checkpoint may name: its file may come from anywhere, and must not open arbitrary files.

A learned prompt names the model that it was learned for. That model's files have to lie beside the prompt's folder,
below the working directory, or below a place in `RAYCLIP_MODELS` (several separated by commas). Models that the user
names are not restricted.
"""

import os
import re
from pathlib import Path

from rayclip.models.specs import parse_mix
from rayclip.models.zoo import PREFIX as ZOO
from rayclip.models.zoo import zoo
from rayclip.store import Store
from rayclip.types import UserError

ROOTS = "RAYCLIP_MODELS"
_LOCAL = "local-dir:"
_HUB = re.compile(r"hf-hub:[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?")
_PUBLISHED = re.compile(r"(hf-hub:)?[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w.-]+)?")  # a tower or a tokenizer
_TOWERS = (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name"), ("text_cfg", "hf_tokenizer_name"))
_TAGGED = re.compile(r"[\w-][\w./-]*:(?P<tag>[\w.-]+)")  # an open_clip model with published weights, no file


def check_named(spec: str, folder: str | Path) -> None:
    """Raise a `UserError` unless the checkpoint in `folder` (or at that URI) may name the model `spec`."""
    if spec == "digits" or _HUB.fullmatch(spec) or (spec.startswith(ZOO) and spec.removeprefix(ZOO) in zoo()):
        return
    if spec.startswith("mix:"):
        for end in parse_mix(spec)[:2]:
            check_named(end, folder)
        return
    if spec.startswith(_LOCAL):
        place = _place(spec.removeprefix(_LOCAL))
        named = filter(None, os.environ.get(ROOTS, "").split(","))
        if not any(_below(place, root) for root in (_parent(_place(str(folder))), *map(_place, (".", *named)))):
            raise UserError(
                f"the prompt in {folder} names a model outside of its surroundings, {place}: if you trust it, set "
                f"{ROOTS}={_parent(place)}."
            )
        return
    tagged = None if spec.startswith(("prompted:", "hf-hub:")) else _TAGGED.fullmatch(spec)
    if tagged is None or Path(tagged["tag"]).exists():
        raise UserError(f"the prompt in {folder} names '{spec}', which no checkpoint may name as its model.")


def check_towers(config: object, folder: str | Path) -> None:
    """Raise a `UserError` if an open_clip configuration names a tower or a tokenizer by a path instead of a name."""
    parts = config.get("model_cfg") if isinstance(config, dict) else None
    for part, key in _TOWERS:
        tower = parts.get(part) if isinstance(parts, dict) else None
        name = tower.get(key) if isinstance(tower, dict) else None
        if name and not (isinstance(name, str) and _PUBLISHED.fullmatch(name)):
            raise UserError(f"the configuration in {folder} names {key} '{name}', which is no published one's name.")


def allow(spec: str) -> None:
    """Let checkpoints name a model that the user has named, also in the workers of a Ray instance that starts later."""
    for part in spec.removeprefix("mix:").rpartition("@")[0].split("+") if spec.startswith("mix:") else [spec]:
        known = list(filter(None, os.environ.get(ROOTS, "").split(",")))
        if part.startswith(_LOCAL) and (place := _place(part.removeprefix(_LOCAL))) not in known:
            os.environ[ROOTS] = ",".join([*known, place])


def _place(where: str) -> str:
    """Return an absolute path without links, or a URI."""
    store = Store(where)
    return str(store.path("").resolve()) if store.is_local else store.root


def _parent(place: str) -> str:
    if "://" not in place:
        return str(Path(place).parent)
    address, mark, options = place.partition("?")
    scheme, _, path = address.rstrip("/").partition("://")
    return f"{scheme}://{path.rpartition('/')[0] or path}{mark}{options}"


def _below(place: str, root: str) -> bool:
    if "://" not in place:
        return "://" not in root and Path(place).is_relative_to(root)
    (address, _, options), (base, _, own) = place.partition("?"), root.partition("?")
    inside = address.removeprefix(base.rstrip("/"))
    # The options include the endpoint; `%2e%2e` is decoded to `..` when the address is opened.
    return options == own and inside != address and inside[:1] in ("", "/") and not re.search(r"\.\.|%", inside)

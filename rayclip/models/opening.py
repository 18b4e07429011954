"""Open any model by its specification: `load_model` for everybody, `load_once` for what attacks and defences need."""

import warnings
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rayclip.models.checkpoint import PROMPT_FILE, read_lineage
from rayclip.models.clip import Clip
from rayclip.models.coupled import WithCoupledTokens
from rayclip.models.loading import Source, build, explain, parse, put_matching
from rayclip.models.mixing import mix
from rayclip.models.named import check_named
from rayclip.models.prompts import Prompted, WithContext, WithFrame, WithFrameAndTokens
from rayclip.models.specs import parse_mix
from rayclip.models.weights import check_finite, read_weights, sha256
from rayclip.models.zoo import PREFIX as ZOO
from rayclip.models.zoo import WEIGHTS, PublishedModel, find_published
from rayclip.store import Store
from rayclip.types import UserError, check_same

KINDS: dict[str, type[Prompted]] = {
    kind.kind: kind for kind in (WithContext, WithFrame, WithFrameAndTokens, WithCoupledTokens)
}


def load_model(spec: str, device: torch.device | str = "cpu") -> Clip:
    """Load a model in fp32.

    Args:
        spec: `digits` (bundled), `local-dir:PLACE` (a folder or a URI, in open_clip's or transformers' layout),
            `hf-hub:ORG/NAME` (open_clip), `hf:ORG/NAME@REVISION` (transformers), or an open_clip `NAME:TAG` such as
            `ViT-B-32:openai`. TAG may be a file of weights (`weights`); the name then has to state its activation,
            since the file does not: `ViT-B-32-quickgelu:FILE` (OpenAI's) or `ViT-B-32-gelu:FILE`. Also `zoo:NAME`, a
            published robust CLIP (`zoo`), `prompted:DIR` with a learned prompt (`prompts`), or `mix:START+END@a`
            between two of these (`mixing`).

    Raises:
        UserError: no such model, files missing or unreachable, weights of another shape, with NaN or infinity, or of an
            unknown activation.
    """
    if spec.startswith("prompted:"):
        return load_prompted(spec, device)
    if spec.startswith("mix:"):
        start, end, a = parse_mix(spec)
        return mix(load_model(start, device), load_model(end, device), a, spec)
    if spec.startswith(ZOO):
        return load_published(find_published(spec), device)
    return _load(spec, parse(spec), device)


def _load(spec: str, source: Source, device: torch.device | str) -> Clip:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, config, tokenizer = build(spec, source, torch.device(device))
        except UserError:
            raise
        except (RuntimeError, ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(explain(spec, error)) from error
    return Clip(model, config, tokenizer, spec).to(device).eval()


@lru_cache(maxsize=2)
def load_once(spec: str, fingerprint: str = "", device: str = "cpu") -> Clip:
    """Load a model that an attack or a defence needs besides the victim: once per process, frozen.

    Args:
        fingerprint: the fingerprint that it must have; empty accepts any.
    """
    clip = load_model(spec, device).requires_grad_(False)
    if fingerprint:
        check_same("model", spec, clip.fingerprint(), fingerprint)
    return clip


def load_published(published: PublishedModel, device: torch.device | str = "cpu") -> Clip:
    """Load a model of the zoo as its row states it, and check its hash if the row has one.

    Raises:
        UserError: it cannot be downloaded (with where to get it), is not what the row says, or what `load_model`
            raises.
    """
    place = published.fetch()
    if published.sha256:
        _check_hash(published, place)
    if place.is_file():
        clip = load_model(published.base, device)
        put_matching(read_weights(place), clip.model, published.base)
    else:
        clip = _load(published.spec, parse(f"local-dir:{place}")._replace(published=published), device)
    clip.spec = published.spec
    return clip


def _check_hash(published: PublishedModel, place: Path) -> None:
    """Raise a `UserError` if a file of weights, or the one that a folder was imported from, is not the row's."""
    inside = (place / name for names in WEIGHTS.values() for name in names)
    file = place if place.is_file() else next(filter(Path.is_file, inside), place)
    if file.is_dir():  # without weights, which reading it reports
        return
    imported = None if place.is_file() else (read_lineage(place) or {}).get("imported")
    found = (imported or {}).get("sha256") or sha256(file)
    if found != published.sha256:
        raise UserError(
            f"{file} is not the file of {published.spec}: its SHA-256 is {found[:12]}… and not "
            f"{published.sha256[:12]}…; it is damaged or another model: download it again from {published.link}."
        )


def load_prompted(spec: str, device: torch.device | str = "cpu") -> Clip:
    """Load a learned prompt and its model, `prompted:DIR`.

    Raises:
        UserError: there is no prompt, or its model is missing, has changed, or may not be named by a checkpoint
            (`named`).
    """
    folder = spec.removeprefix("prompted:")
    about = (read_lineage(folder) or {}).get("prompt")
    if not isinstance(about, dict) or str(about.get("kind")) not in KINDS or not isinstance(about.get("base"), str):
        raise UserError(f"model '{spec}': {folder} holds no learned prompt; give a folder of a run that learned one.")
    check_named(about["base"], folder)
    try:
        base = load_model(about["base"], device)
    except UserError as error:
        raise UserError(f"the prompt in {folder} stands on a model that is not there: {error}") from error
    if base.fingerprint() != about.get("base_fingerprint"):
        raise UserError(
            f"the prompt in {folder} was learned on another model than '{about['base']}' is now: bring that back."
        )
    try:
        learned = load_file(Store(folder).node_copy((PROMPT_FILE,)) / PROMPT_FILE)[about["kind"]]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"model '{spec}': {PROMPT_FILE} is missing or damaged; copy it again.") from error
    check_finite({about["kind"]: learned}, f"model '{spec}'")
    clip = KINDS[about["kind"]](base, learned)
    clip.spec = spec
    return clip.eval()

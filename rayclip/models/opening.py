"""Open any model by its specification: `load_model` for everybody, `load_once` for what attacks and defences need."""

import warnings
from functools import lru_cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rayclip.models.checkpoint import PROMPT_FILE, read_lineage
from rayclip.models.clip import Clip
from rayclip.models.loading import build, explain, parse
from rayclip.models.mixing import mix
from rayclip.models.named import check_named
from rayclip.models.prompts import KINDS
from rayclip.models.specs import parse_mix
from rayclip.models.weights import check_finite
from rayclip.store import Store
from rayclip.types import UserError, check_same


def load_model(spec: str, device: torch.device | str = "cpu") -> Clip:
    """Load a model in fp32.

    Args:
        spec: `digits` (bundled), `local-dir:PLACE` (a folder or a URI, in open_clip's or transformers' layout),
            `hf-hub:ORG/NAME` (open_clip), `hf:ORG/NAME@REVISION` (transformers), or an open_clip `NAME:TAG` such as
            `ViT-B-32:openai`. TAG may be a file of weights (`weights`); the name then has to state its activation,
            since the file does not: `ViT-B-32-quickgelu:FILE` (OpenAI's) or `ViT-B-32-gelu:FILE`. Also `prompted:DIR`
            with a learned prompt (`prompts`), or `mix:START+END@a` between two of these (`mixing`).

    Raises:
        UserError: no such model, files missing or unreachable, weights of another shape, with NaN or infinity, or of an
            unknown activation.
    """
    if spec.startswith("prompted:"):
        return load_prompted(spec, device)
    if spec.startswith("mix:"):
        start, end, a = parse_mix(spec)
        return mix(load_model(start, device), load_model(end, device), a, spec)
    source = parse(spec)
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


def load_prompted(spec: str, device: torch.device | str = "cpu") -> Clip:
    """Load a learned prompt and its model, `prompted:DIR`.

    Raises:
        UserError: there is no prompt, or its model is missing, has changed, or may not be named by a checkpoint
            (`named`).
    """
    folder = spec.removeprefix("prompted:")
    about = (read_lineage(folder) or {}).get("prompt")
    if not isinstance(about, dict) or about.get("kind") not in KINDS or not isinstance(about.get("base"), str):
        raise UserError(f"model '{spec}': {folder} holds no learned prompt; give a folder that advpt or vp wrote.")
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

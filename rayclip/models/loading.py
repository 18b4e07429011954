"""Loads a model from its specification: what it names, its weights, and the activation that they were trained with."""

import codecs
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from rayclip.models import transformers_layout
from rayclip.models.named import check_towers
from rayclip.models.sizes import check_form, check_sizes
from rayclip.models.weights import Fitting, WeightsFile, check_finite, match, misfits, put, read_weights
from rayclip.models.zoo import PREFIX as ZOO
from rayclip.models.zoo import PublishedModel, find_published
from rayclip.paths import temporary_folder
from rayclip.store import Store
from rayclip.types import UserError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHTS_FILES = (WEIGHTS_FILE, "open_clip_pytorch_model.bin")  # that a folder may have, in order of preference
_GELU, _QUICK_GELU = "-gelu", "-quickgelu"  # suffixes of names, which state the activation of a file of weights
BUNDLED = {"digits": Path(__file__).parent / "digits"}


@contextmanager
def silence() -> Iterator[None]:
    """Silence logging: libraries report progress and retries through the root logger; real problems are raised as
    exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


class Source(NamedTuple):
    """A parsed specification, as open_clip needs it.

    Attributes:
        name: `local-dir:FOLDER`, `hf-hub:ORG/NAME`, or one of open_clip's architectures; `hf:ORG/NAME` for a model of
            transformers.
        tag: of published weights.
        file: weights that are read here.
        gelu: the user states that the weights of `file` were trained with GELU.
        folder: in transformers' layout.
        published: the row of the zoo that overrules a folder's configuration.
    """

    name: str
    tag: str | None = None
    file: Path | None = None
    gelu: bool = False
    folder: Path | None = None
    published: PublishedModel | None = None


def parse(spec: str) -> Source:
    """Parse a specification, after cheap checks."""
    if spec in BUNDLED:
        return Source(f"local-dir:{BUNDLED[spec]}", file=BUNDLED[spec] / WEIGHTS_FILE)
    if spec.startswith("local-dir:"):
        place = spec.removeprefix("local-dir:")
        folder = Store(place).node_copy((CONFIG_FILE, *_WEIGHTS_FILES, *transformers_layout.FILES))
        if transformers_layout.is_transformers(folder):
            return Source(spec, folder=folder)
        file = find_weights(folder)
        if not (folder / CONFIG_FILE).is_file() or file is None:
            missing = CONFIG_FILE if file is not None or not (folder / CONFIG_FILE).is_file() else WEIGHTS_FILE
            raise UserError(
                f"model '{spec}': no file {missing} in {place}; give a folder that holds {CONFIG_FILE} "
                f"and {WEIGHTS_FILE}."
            )
        with suppress(ValueError, RecursionError):  # open_clip reports what is wrong with it
            check_towers(json.loads((folder / CONFIG_FILE).read_text("utf-8-sig")), place)
        return Source(f"local-dir:{folder}", file=file)
    if spec.startswith(transformers_layout.HUB):
        return Source(transformers_layout.check_name(spec))
    if spec.startswith("hf-hub:"):
        return Source(spec)
    import open_clip  # the import takes seconds, which driver processes need not spend

    name, _, tag = spec.partition(":")
    known, said, is_file = open_clip.list_models(), name.replace("/", "-"), Path(tag).is_file()
    gelu = said not in known and is_file and said.endswith(_GELU)
    if gelu:
        name, said = name.removesuffix(_GELU), said.removesuffix(_GELU)
    if said not in known:
        raise UserError(
            f"unknown model '{spec}': use digits, local-dir:PATH, hf:ORG/NAME, hf-hub:ORG/NAME or an "
            "open_clip NAME:TAG such as ViT-B-32:openai."
        )
    tags = open_clip.list_pretrained_tags_by_model(said)
    if tag in tags and not gelu:
        return Source(name, tag)
    if not is_file:
        lacks = f"has no weights '{tag}'" if tag else "needs its weights named"
        raise UserError(
            f"model '{name}' {lacks}: write {name}:TAG, with TAG a weights file or one of {', '.join(tags)}."
        )
    return Source(said, tag, gelu=gelu) if tag.endswith(".npz") else Source(said, file=Path(tag), gelu=gelu)


def find_weights(folder: Path) -> Path | None:
    """Return the file of weights in an open_clip folder."""
    return next((folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()), None)


def patch_size(spec: str) -> int | None:
    """Return the side of the image tower's patches in pixels, from the model's configuration alone; None if it does not
    say or is not available."""
    import open_clip

    with suppress(UserError, OSError, ValueError, RuntimeError, KeyError), silence():
        if spec.startswith(ZOO):
            found = (open_clip.get_model_config(find_published(spec).architecture) or {}).get("vision_cfg", {})
            return found.get("patch_size")
        source = parse(spec)
        if source.folder is not None or source.name.startswith(transformers_layout.HUB):
            folder = source.folder or transformers_layout.download(source.name, weights=False)
            return int(transformers_layout.read_config(folder, spec)["model_cfg"]["vision_cfg"]["patch_size"])
        found = (open_clip.get_model_config(source.name) or {}).get("vision_cfg", {}).get("patch_size")
        return found if isinstance(found, int) else None
    return None


def build(spec: str, source: Source, device: torch.device) -> tuple[nn.Module, dict[str, Any], Any]:
    """Return a model in fp32, a configuration that rebuilds it (`model_cfg` and `preprocess_cfg`), and its
    tokenizer."""
    import open_clip

    name, tag, file, _, folder, published = source
    if folder is not None or name.startswith(transformers_layout.HUB):
        with silence():
            return _build_from_transformers(folder or transformers_layout.download(name), spec)
    is_folder, found = name.startswith("local-dir:"), None if file is None else read_weights(file)
    if is_folder and found is not None:
        place = Path(name.removeprefix("local-dir:")) / CONFIG_FILE
        described = json.loads(place.read_text("utf-8-sig"))
        model_cfg = described.get("model_cfg") if isinstance(described, dict) else None
        check_form(described, place)
        check_sizes(model_cfg, (x for group in found.groups.values() for x in group.values()), place)
    quick_gelu = False
    if tag is not None:
        quick_gelu = bool(open_clip.get_pretrained_cfg(name.replace("/", "-"), tag).get("quick_gelu"))
    elif found is not None and not is_folder:
        quick_gelu = _has_quick_gelu(source, found)
    with silence(), _readable(name, published) as readable:
        model = open_clip.create_model(
            readable,
            pretrained=tag,
            device=device,
            precision="fp32",
            force_quick_gelu=quick_gelu,
            load_weights=found is None,
            require_pretrained=found is None,
            pretrained_image=False,
            pretrained_text=False,
        )
        config = _full_config(model, readable, quick_gelu)
        tokenizer = _tokenizer_of(readable, config["model_cfg"].get("text_cfg", {}))
    if found is not None:
        _fill(model, found, spec, name, is_folder)
    check_finite(model.state_dict(), f"model '{spec}'")
    return model, config, tokenizer


def _build_from_transformers(folder: Path, spec: str) -> tuple[nn.Module, dict[str, Any], Any]:
    model, config = transformers_layout.build(folder, _clip_tokenizer("{}").encoder, spec)
    check_finite(model.state_dict(), f"model '{spec}'")
    text_cfg = config["model_cfg"]["text_cfg"]
    own = text_cfg.get("hf_tokenizer_name")
    return model, config, _other_tokenizer(folder, text_cfg) if own else _tokenizer_of("", text_cfg)


def _tokenizer_of(name: str, text_cfg: dict[str, Any]) -> Any:
    """Return the tokenizer of an open_clip name or folder; models whose tokenizer is CLIP's own share one."""
    import open_clip

    published, folder = text_cfg.get("hf_tokenizer_name"), Path(name.removeprefix("local-dir:"))
    if published and name.startswith("local-dir:"):
        is_beside = any((folder / file).is_file() for file in transformers_layout.TOKENIZER_FILES)
        return _other_tokenizer(folder if is_beside else published, text_cfg)
    if published or "siglip" in name.lower():
        return open_clip.get_tokenizer(name)
    length = {"context_length": text_cfg["context_length"]} if "context_length" in text_cfg else {}
    return _clip_tokenizer(json.dumps(text_cfg.get("tokenizer_kwargs", {}) | length, sort_keys=True))


def _other_tokenizer(place: Path | str, text_cfg: dict[str, Any]) -> Any:
    """Return a tokenizer that is not CLIP's own, from a folder or by its published name."""
    from open_clip.tokenizer import HFTokenizer

    settings = {name: text_cfg[name] for name in ("context_length", "tokenizer_mode") if name in text_cfg}
    return HFTokenizer(str(place), **settings, **text_cfg.get("tokenizer_kwargs", {}))


@lru_cache(maxsize=8)
def _clip_tokenizer(settings: str) -> Any:
    """Return CLIP's tokenizer; reading its vocabulary takes longer than building a small model."""
    import open_clip

    return open_clip.SimpleTokenizer(**json.loads(settings))


def _has_quick_gelu(source: Source, found: WeightsFile) -> bool:
    """Return whether a file of weights uses QuickGELU, as stated by the file or by the architecture's name."""
    import open_clip

    name, file = source.name, source.file
    named_quick = bool(open_clip.get_model_config(name).get("quick_gelu"))
    quick = f"{name}{'' if named_quick else _QUICK_GELU}:{file}"
    if found.quick_gelu and source.gelu:
        raise UserError(f"{file} comes from OpenAI's code, whose activation is QuickGELU and not GELU: write {quick}.")
    if found.quick_gelu is False and named_quick:
        plain = name.removesuffix(_QUICK_GELU)
        raise UserError(f"{file} says that its activation is GELU and not QuickGELU: write {plain}{_GELU}:{file}.")
    if found.quick_gelu is None and not source.gelu and f"{name}{_QUICK_GELU}" in open_clip.list_models():
        raise UserError(
            f"model '{name}:{file}': a file of weights does not say which activation it was trained with: write "
            f"{quick} for QuickGELU (OpenAI's models and what was fine-tuned from them), or {name}{_GELU}:{file} for "
            "GELU (LAION's, DataComp's)."
        )
    return named_quick or bool(found.quick_gelu)


def put_matching(found: WeightsFile, model: nn.Module, what: str) -> Fitting:
    """Put the weights of a file, of a whole CLIP or its image tower, into a model; return what fitted.

    Raises:
        UserError: what `match` raises; they do not fit `what` the model is, or contain NaN.
    """
    fitting = match(found, model)
    tower = model if fitting.part == "whole" else model.get_submodule("visual")
    if wrong := misfits(tower, fitting.weights):
        raise UserError(f"{found.path} does not fit {what}: {wrong}; name the model that it was fine-tuned from.")
    check_finite(fitting.weights, str(found.path))
    put(tower, fitting.weights)
    return fitting


def _fill(model: nn.Module, found: WeightsFile, spec: str, name: str, is_folder: bool) -> None:
    """Load the weights of a file into a model, if they are those of a whole CLIP and fit."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    _, _, part, weights, _ = match(found, model)
    if part == "image":
        raise UserError(
            f"model '{spec}': {found.path} holds the image tower alone: write it as a whole model with rayclip import "
            f"{found.path} --base MODEL --out FOLDER, with the model that it was fine-tuned from."
        )
    if is_folder:  # a configuration for other images or texts than the weights is deliberate
        resize_pos_embed(weights, model)
        with suppress(AssertionError):  # of texts of another width, which do not fit
            resize_text_pos_embed(weights, model)
    if wrong := misfits(model, weights):
        fitting = (
            (CONFIG_FILE, "put the configuration that belongs to these weights beside them")
            if is_folder
            else (name, "name the architecture that they are of")
        )
        raise UserError(f"model '{spec}': the weights do not fit {fitting[0]}: {wrong}; {fitting[1]}.")
    put(model, weights)


@contextmanager
def _readable(source: str, published: PublishedModel | None) -> Iterator[str]:
    """Yield a source whose configuration open_clip reads: a temporary folder if the file begins with a byte order mark,
    which some editors add, or if a row of the zoo overrules it."""
    folder = Path(source.removeprefix("local-dir:"))
    written = (folder / CONFIG_FILE).read_bytes() if source.startswith("local-dir:") else b""
    wanted = written.removeprefix(codecs.BOM_UTF8)
    if published is not None:
        wanted = json.dumps(published.adapt(json.loads(wanted))).encode()
    if wanted == written:
        yield source
        return
    with temporary_folder() as place:
        for file in folder.absolute().iterdir():
            (place / file.name).symlink_to(file)
        (place / CONFIG_FILE).unlink()
        (place / CONFIG_FILE).write_bytes(wanted)
        yield f"local-dir:{place}"


def _full_config(model: nn.Module, source: str, quick_gelu: bool) -> dict[str, Any]:
    """Return `model_cfg` and `preprocess_cfg` such that `local-dir:` rebuilds exactly this model."""
    import open_clip

    model_cfg = json.loads(json.dumps(open_clip.get_model_config(source)))
    if quick_gelu:
        model_cfg["quick_gelu"] = True
    preprocess_cfg = {k: v for k, v in dict(open_clip.get_model_preprocess_cfg(model)).items() if v is not None}
    return {"model_cfg": model_cfg, "preprocess_cfg": json.loads(json.dumps(preprocess_cfg))}


def explain(spec: str, error: Exception) -> str:
    message = str(error)
    if "size mismatch" in message or "Missing key" in message or "Unexpected key" in message:
        return (
            f"model '{spec}': the weights do not fit {CONFIG_FILE} (another shape or architecture); "
            "put the configuration that belongs to these weights beside them."
        )
    if isinstance(error, SafetensorError):
        return f"model '{spec}': {WEIGHTS_FILE} is damaged or no safetensors file; copy it again."
    if spec.startswith("local-dir:") and isinstance(error, OSError):
        return (
            f"model '{spec}' could not be loaded: a tower or tokenizer of the hub that its configuration names is not "
            "reachable and not in the hub's cache (HF_HOME), or a file of the folder cannot be read."
        )
    if not spec.startswith("local-dir:") and spec not in BUNDLED and not Path(spec.partition(":")[2]).is_file():
        return (
            f"model '{spec}' could not be downloaded: check its name, the network and HF_HOME, or save it as a folder "
            "and use local-dir:PATH."
        )
    return f"model '{spec}' could not be loaded: {message.splitlines()[0][:200] if message else type(error).__name__}."

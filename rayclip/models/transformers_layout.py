"""CLIPs of transformers as open_clip's: the same function under other names, so that everything of rayclip works on it.

A folder or a repository holds `config.json` (`CLIPConfig`), weights, and possibly the settings of its image processor
and a tokenizer. open_clip's configuration is made from the first, in the form in which open_clip itself writes it: a
model has the same fingerprint, whichever of the two it was read from.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayclip.models.sizes import check_sizes
from rayclip.models.weights import WeightsFile, misfits, put, read_weights
from rayclip.models.zoo import CLIPS_OWN
from rayclip.types import UserError

IMAGE_TOWER = "clip_vision_model"  # a CLIPVisionModel's model_type
HUB = "hf:"  # the prefix of `hf:ORG/NAME`
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference
_INDEX = ".index.json"  # behind the name of weights that are split into several files
_SMALL = ("config.json", "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)
FILES = (*_SMALL, *_WEIGHTS)
END, START = 49407, 49406  # rows of CLIP's own vocabulary
MARKS = {START: ("<start_of_text>", "<|startoftext|>"), END: ("<end_of_text>", "<|endoftext|>")}  # open_clip's, theirs
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # PIL's numbers
# Whether they are QuickGELU, and open_clip's `act_kwargs`
ACTIVATIONS: dict[str, tuple[bool, dict[str, str] | None]] = {
    "quick_gelu": (True, None),
    "gelu": (False, None),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
    "gelu_new": (False, {"approximate": "tanh"}),
}
_HEAD_WIDTH, _MLP_RATIO, EPS = 64, 4, 1e-5  # what open_clip's files leave out
OLD_END = 2  # as the id of the end mark, tells transformers to read a text at its highest token

_NAMES = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
_INSIDE = (
    *((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".mlp.c_fc.", ".mlp.fc1.")),
    *((".mlp.c_proj.", ".mlp.fc2."), (".attn.out_proj.", ".self_attn.out_proj.")),
)


def is_transformers(folder: Path) -> bool:
    """Return whether a folder is in transformers' layout and not in open_clip's."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def check_name(spec: str) -> str:
    """Return a specification of the hub unchanged. Raises `UserError` if it can be none."""
    if re.fullmatch(r"hf:[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", spec) is None:
        folder = Path(spec.removeprefix(HUB)).expanduser()
        right = f"local-dir:{folder}" if folder.is_dir() else "hf:ORG/NAME or hf:ORG/NAME@REVISION"
        raise UserError(f"'{spec}' names no model of the hub: write {right}.")
    return spec


def download(spec: str, *, weights: bool = True) -> Path:
    """Return the folder of `hf:ORG/NAME` or `hf:ORG/NAME@REVISION` in the hub's cache, with the files that it needs.

    Raises:
        OSError: no such model, or neither in the cache nor reachable.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    name, _, revision = spec.removeprefix(HUB).partition("@")
    about: dict[str, Any] = {"repo_id": name, "revision": revision or None}
    try:
        folder = Path(snapshot_download(**about, allow_patterns=list(_SMALL)))
        for file in (file + end for file in _WEIGHTS for end in ("", _INDEX)) if weights else ():
            with suppress(EntryNotFoundError):
                found = Path(hf_hub_download(**about, filename=file))
                for part in _parts(found) if file.endswith(_INDEX) else ():
                    hf_hub_download(**about, filename=part)
                break
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error
    return folder


def read_config(folder: Path, spec: str) -> dict[str, Any]:
    """Return a folder's model in open_clip's terms, `model_cfg` and `preprocess_cfg`.

    Raises:
        UserError: it is no CLIP, an image tower or a text tower alone, or one that open_clip cannot express.
    """
    from transformers import CLIPConfig

    _check_kind(folder, spec)
    cfg = model_cfg(_parsed(CLIPConfig, folder, spec), spec)
    return {"model_cfg": cfg, "preprocess_cfg": _pixels(folder, cfg["vision_cfg"]["image_size"], spec)}


def _parsed(kind: Any, folder: Path, spec: str) -> Any:
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # the checks of its dataclasses have errors of their own, by version
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model '{spec}': its config.json is no {kind.__name__} ({reason}).") from error


def model_type(folder: Path) -> str:
    """Return the `model_type` that a folder's `config.json` states, such as `clip` or `clip_vision_model`."""
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8-sig"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json is missing, damaged, or none of transformers.") from error


def _check_kind(folder: Path, spec: str) -> None:
    kind = model_type(folder)
    if kind == IMAGE_TOWER:
        raise UserError(
            f"model '{spec}' is an image tower alone: put it into the model that it was fine-tuned from, with rayclip "
            "import FOLDER --base MODEL --out FOLDER."
        )
    if kind != "clip":
        raise UserError(
            f"model '{spec}' is a '{kind}' of transformers, of which rayclip reads CLIPModel (model_type clip) alone: "
            "take the same model in open_clip's layout."
        )


def model_cfg(config: Any, spec: str) -> dict[str, Any]:
    """Return open_clip's `model_cfg` of a `CLIPConfig`, without what open_clip's own files leave out.

    Raises:
        UserError: open_clip has no such model.
    """
    image, text = config.vision_config, config.text_config
    activations = [part.hidden_act for part in (image, text)]
    if unknown := [name for name in activations if name not in ACTIVATIONS]:
        raise UserError(f"model '{spec}' has the activation {unknown[0]}, which open_clip's CLIP does not have.")
    is_quick = ACTIVATIONS[activations[0]][0]
    if is_quick != ACTIVATIONS[activations[1]][0]:
        raise UserError(f"model '{spec}' has QuickGELU in one tower only, which open_clip's CLIP cannot have.")
    if not (isinstance(image.image_size, int) and isinstance(image.patch_size, int) and image.num_channels == 3):
        raise UserError(f"model '{spec}' does not take square images of three channels, as rayclip's models do.")
    if not isinstance(text.eos_token_id, int):
        raise UserError(f"model '{spec}' has the end marks {text.eos_token_id}, and open_clip's CLIP has one.")
    width, head_width = image.hidden_size, image.hidden_size // image.num_attention_heads
    vision_cfg = {"image_size": image.image_size, "layers": image.num_hidden_layers, "width": width}
    vision_cfg |= {"patch_size": image.patch_size} | ({} if head_width == _HEAD_WIDTH else {"head_width": head_width})
    text_cfg = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    text_cfg |= {"width": text.hidden_size, "heads": text.num_attention_heads, "layers": text.num_hidden_layers}
    if text.eos_token_id not in (OLD_END, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    for part, cfg in ((image, vision_cfg), (text, text_cfg)):
        inner, width, settings = part.intermediate_size, part.hidden_size, ACTIVATIONS[part.hidden_act][1]
        if inner != _MLP_RATIO * width:
            ratio = inner / width
            cfg["mlp_ratio"] = ratio if int(width * ratio) == inner else (inner + 0.5) / width
        if part.layer_norm_eps != EPS:
            cfg["norm_kwargs"] = {"eps": part.layer_norm_eps}
        if settings is not None:
            cfg["act_kwargs"] = settings
    quick = {"quick_gelu": True} if is_quick else {}
    return {"embed_dim": config.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg} | quick


def _pixels(folder: Path, size: int, spec: str) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg`; where a folder does not say, CLIP's own."""
    said: dict[str, Any] = {}
    for name, entry in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            read = json.loads((folder / name).read_text("utf-8-sig"))
            said = read.get(entry, said) if entry else read
    whole = said.get("size", size)
    shape = (said.get("crop_size") if said.get("do_center_crop", True) else None) or whole
    sides = {shape} if isinstance(shape, int) else {shape.get(s, size) for s in ("height", "width", "shortest_edge")}
    if sides != {size}:
        raise UserError(
            f"model '{spec}': its image processor makes images of {sides} pixels, and its image tower takes {size}: "
            "correct preprocessor_config.json."
        )
    scales = said.get("do_normalize", True)
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": list(said.get("image_mean", CLIPS_OWN[0])) if scales else [0.0] * 3,
        "std": list(said.get("image_std", CLIPS_OWN[1])) if scales else [1.0] * 3,
        "interpolation": {number: name for name, number in RESAMPLE.items()}.get(said.get("resample", 3), "bicubic"),
        "resize_mode": "squash" if isinstance(whole, dict) and "height" in whole else "shortest",
        "fill_color": 0,
    }


def complete(part: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return `vision_cfg` or `text_cfg` with open_clip's defaults for what it does not say, without what has no effect
    in eval mode."""
    found = asdict(kind(**part))
    return {name: value for name, value in found.items() if name not in ("patch_dropout", "hf_model_pretrained")}


def names_there(name: str) -> tuple[list[str], bool]:
    """Return transformers' names of a weight of open_clip's CLIP, and whether its matrix is transposed there; no names
    if there are none. Query, key and value are three weights there and one here, in this order."""
    for own, other in _NAMES:
        if name == own or (own.endswith(".") and name.startswith(own)):
            found = other + name.removeprefix(own)
            for inside, outside in _INSIDE:
                found = found.replace(inside, outside)
            together = re.fullmatch(r"(.*\.)attn\.in_proj_(weight|bias)", found)
            if together:
                return [f"{together[1]}self_attn.{each}_proj.{together[2]}" for each in "qkv"], False
            return [found], name in ("visual.proj", "text_projection")
    return [], False


def to_open_clip(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return open_clip's `names` among transformers' weights, those that are there."""
    found = {}
    for name in names:
        others, transposed = names_there(name)
        if others and all(other in weights for other in others):
            tensor = torch.cat([weights[other] for other in others]) if len(others) > 1 else weights[others[0]]
            found[name] = tensor.T if transposed else tensor
    return found


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an open_clip CLIP's weights under transformers' names. Raises `KeyError` for one that is unknown there."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        others, transposed = names_there(name)
        if not others:
            raise KeyError(name)
        parts = tensor.chunk(len(others)) if len(others) > 1 else (tensor.T if transposed else tensor,)
        found |= dict(zip(others, parts, strict=True))
    return found


def find_weights(folder: Path) -> Path | None:
    """Return the file of weights in a folder, or the index of several."""
    files = (folder / (name + end) for name in _WEIGHTS for end in ("", _INDEX))
    return next((file for file in files if file.is_file()), None)


def read_folder(folder: Path, spec: str) -> dict[str, Tensor]:
    """Return a folder's weights under transformers' names; no code of a file runs.

    Raises:
        UserError: there are none, a part is missing, or as `weights.read_weights`.
    """
    file = find_weights(folder)
    if file is None:
        raise UserError(f"model '{spec}': there is no {_WEIGHTS[0]} beside its config.json.")
    found: dict[str, Tensor] = {}
    for part in _parts(file) if file.name.endswith(_INDEX) else [file.name]:
        found |= read_weights(folder / part).groups.get("", {})
    # transformers 5 writes an image tower of its own making without its name in front
    bare = "embeddings.patch_embedding.weight" in found
    return {f"vision_model.{n}" if bare else n: x for n, x in found.items() if not n.endswith("position_ids")}


def _parts(index: Path) -> list[str]:
    try:
        parts = sorted(map(str, set(json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: copy it again.") from error
    if any(Path(part).name != part for part in parts):
        raise UserError(f"{index} names files outside of its folder.")
    return parts


def build(folder: Path, vocabulary: Mapping[str, int], spec: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a folder's model as open_clip's, and its configuration, which says `hf_tokenizer_name` only if the folder
    has a tokenizer with another vocabulary than CLIP's own, `vocabulary`.

    Raises:
        UserError: as `read_config` and `read_folder`, or weights that do not fit the configuration.
    """
    import open_clip

    config, weights = read_config(folder, spec), read_folder(folder, spec)
    check_sizes(config["model_cfg"], weights.values(), folder / "config.json")
    model = open_clip.CLIP(**config["model_cfg"])
    own = to_open_clip(weights, model.state_dict())
    used = {other for name in own for other in names_there(name)[0]}
    if wrong := misfits(model, own | {name: x for name, x in weights.items() if name not in used}):
        raise UserError(f"model '{spec}': the weights do not fit its config.json: {wrong}.")
    put(model, own)
    text_cfg = config["model_cfg"]["text_cfg"]
    if not _is_own(folder, vocabulary, spec):
        text_cfg["hf_tokenizer_name"] = "own"  # open_clip takes it from beside the checkpoint, whatever its name
    elif text_cfg["vocab_size"] < len(vocabulary):
        raise UserError(f"model '{spec}' reads {text_cfg['vocab_size']} tokens, and its tokenizer's files are missing.")
    return model, config


def _is_own(folder: Path, vocabulary: Mapping[str, int], spec: str) -> bool:
    """Return whether a folder's tokenizer is CLIP's own, or missing."""
    marks = {mark for pair in MARKS.values() for mark in pair}
    own = {token: row for token, row in vocabulary.items() if token not in marks}
    try:
        if (folder / "vocab.json").is_file():
            found = json.loads((folder / "vocab.json").read_text("utf-8"))
        elif (folder / "tokenizer.json").is_file():
            found = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        else:
            return not any((folder / name).is_file() for name in TOKENIZER_FILES)
        return isinstance(found, dict) and own == {token: row for token, row in found.items() if token not in marks}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model '{spec}': its tokenizer's files are damaged; copy them again.") from error


def read_image_tower(folder: Path, model: nn.Module, config: Mapping[str, Any], base: str) -> WeightsFile:
    """Return the weights of a folder with a `CLIPVisionModel` under open_clip's names.

    The projection into the space of embeddings, which such a folder may lack, is then the base's.

    Args:
        model, config, base: the model that it was fine-tuned from, its configuration and its specification.

    Raises:
        UserError: the folder holds something else, or a tower or an image processor that is not like the base's.
    """
    from open_clip import CLIPVisionCfg
    from transformers import CLIPConfig, CLIPVisionConfig

    spec = str(folder)
    said = _parsed(CLIPVisionConfig, folder, spec)
    text = {"hidden_act": said.hidden_act}
    cfg = model_cfg(CLIPConfig(vision_config=said.to_dict(), text_config=text), spec)
    pixels = _pixels(folder, cfg["vision_cfg"]["image_size"], spec)
    own, other = (complete(each["vision_cfg"], CLIPVisionCfg) for each in (cfg, config["model_cfg"]))
    own |= {name: pixels[name] for name in ("mean", "std")}
    other |= {name: list(config["preprocess_cfg"][name]) for name in ("mean", "std")}
    if wrong := [f"{name} is {own[name]} and not {other[name]}" for name in own if own[name] != other[name]]:
        raise UserError(f"{folder} does not fit --base {base}: {wrong[0]}; name the model that it was fine-tuned from.")
    state = {name: x for name, x in model.state_dict().items() if name.startswith("visual.")}
    found = {"visual.proj": state["visual.proj"]} | to_open_clip(read_folder(folder, spec), state)
    file = find_weights(folder)
    assert file is not None, "its weights have been read"
    quick = bool(cfg.get("quick_gelu"))
    return WeightsFile(path=file, groups={"": found}, entries=("config.json",), quick_gelu=quick)

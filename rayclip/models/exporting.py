"""Writes a model as a folder for other code: open_clip's layout, or transformers' `CLIPModel` or `CLIPVisionModel`.

A folder for transformers has everything that `from_pretrained` of `CLIPModel`, `CLIPProcessor` and their parts reads,
under the names of their version 4, which later ones read too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rayclip import __version__
from rayclip.models.checkpoint import LINEAGE_FILE, save_checkpoint, save_tokenizer, whole_folder, write_weights
from rayclip.models.clip import Clip
from rayclip.models.prompts import Prompted
from rayclip.models.transformers_layout import (
    ACTIVATIONS,
    END,
    EPS,
    MARKS,
    OLD_END,
    RESAMPLE,
    START,
    complete,
    model_cfg,
    to_transformers,
)
from rayclip.types import UserError

Format = Literal["open_clip", "transformers", "transformers-vision"]


def export_model(clip: Clip, folder: Path, form: Format, lineage: Mapping[str, Any]) -> None:
    """Write a model into a folder, the lineage last.

    Args:
        form: `open_clip`; `transformers`, a `CLIPModel` with processor and tokenizer; `transformers-vision`, its image
            tower alone as `CLIPVisionModelWithProjection`, which `CLIPVisionModel` and what builds on it read.

    Raises:
        UserError: transformers' CLIP cannot express the model, or it is a learned prompt.
    """
    if isinstance(clip, Prompted):
        raise UserError(f"model '{clip.spec}' is a learned prompt, which no other code loads: export its base.")
    lineage = {"rayclip": __version__, **lineage, "exported": {"format": form, "fingerprint": clip.fingerprint()}}
    if form == "open_clip":
        save_checkpoint(clip, folder, lineage)
        return
    config = _config(clip, form)
    state = {name.removeprefix("text."): x for name, x in clip.model.state_dict().items()}
    if form == "transformers":
        state["logit_scale"] = state["logit_scale"].reshape(())
    else:
        state = {name: x for name, x in state.items() if name.startswith("visual.")}
    with whole_folder(folder) as place:
        _write(place / "config.json", config.to_dict())
        _write(place / "preprocessor_config.json", _processor(clip))
        if form == "transformers":
            _write_tokenizer(clip, place)
        write_weights(to_transformers(state), place / "model.safetensors", metadata={"format": "pt"})
        _write(place / LINEAGE_FILE, lineage)


def _config(clip: Clip, form: Format) -> Any:
    """Return the `CLIPConfig` or `CLIPVisionConfig` of a model, if what it makes is the same model in all parts."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg
    from transformers import CLIPConfig, CLIPVisionConfig

    cfg = clip.config["model_cfg"]
    parts = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    parts = parts if form == "transformers" else {"vision_cfg": CLIPVisionCfg}
    own = {name: complete(cfg[name], kind) for name, kind in parts.items()}
    image, text = own["vision_cfg"], own.get("text_cfg", complete({}, CLIPTextCfg))
    if isinstance(image["layers"], list | tuple) or image["timm_model_name"]:
        raise _unknown(clip, "its image tower is no ViT of open_clip's own")
    shared = {"projection_dim": cfg["embed_dim"]}
    config = CLIPConfig(
        vision_config={
            **_sizes(image, bool(cfg.get("quick_gelu"))),
            **shared,
            "num_attention_heads": image["width"] // image["head_width"],
            "image_size": clip.image_size,
            "patch_size": image["patch_size"],
        },
        text_config={
            **_sizes(text, bool(cfg.get("quick_gelu"))),
            **shared,
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": START,
            "eos_token_id": _end(text),
        },
        **shared,
        architectures=["CLIPModel"],
    )
    other = model_cfg(config, clip.spec)
    for name, kind in parts.items():
        found = complete(other[name], kind)
        for key, value in own[name].items():
            if found[key] != value and key not in ("image_size", "hf_tokenizer_name"):
                raise _unknown(clip, f"its {name} has {key} {value}")
    if form == "transformers" and cfg.get("multimodal_cfg"):
        raise _unknown(clip, "it has a decoder of texts")
    if form == "transformers" and cfg.get("init_logit_bias") is not None:
        raise _unknown(clip, "its logits have a bias")
    if form == "transformers":
        return config
    return CLIPVisionConfig(**config.vision_config.to_dict() | {"architectures": ["CLIPVisionModelWithProjection"]})


def _unknown(clip: Clip, what: str) -> UserError:
    return UserError(f"model '{clip.spec}' is none that transformers' CLIP can be: {what}; use --format open_clip.")


def _sizes(part: Mapping[str, Any], is_quick: bool) -> dict[str, Any]:
    """Return what the configurations of both towers have in common."""
    wanted = is_quick, part["act_kwargs"]
    return {
        "hidden_size": part["width"],
        "num_hidden_layers": part["layers"],
        "intermediate_size": int(part["width"] * part["mlp_ratio"]),
        "hidden_act": next((name for name, found in ACTIVATIONS.items() if found == wanted), "gelu"),
        "layer_norm_eps": (part["norm_kwargs"] or {}).get("eps", EPS),
    }


def _end(text: Mapping[str, Any]) -> int:
    """Return the id of the end mark, by which transformers finds where a text is read; 2 is its word for the highest
    token."""
    if text["pool_type"] == "eos":
        return text["eos_id"]
    return END if text["vocab_size"] == END + 1 else OLD_END


def _processor(clip: Clip) -> dict[str, Any]:
    said, size = clip.config["preprocess_cfg"], clip.image_size
    square = {"height": size, "width": size}
    if said.get("resize_mode", "shortest") == "longest":
        raise _unknown(clip, "its images are resized by their longer side")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if said.get("resize_mode", "shortest") == "shortest" else square,
        "resample": RESAMPLE.get(said.get("interpolation", "bicubic"), RESAMPLE["bicubic"]),
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(said["mean"]),
        "image_std": list(said["std"]),
        "do_convert_rgb": True,
    }


def _write_tokenizer(clip: Clip, place: Path) -> None:
    """Write CLIP's own tokenizer as transformers' `CLIPTokenizer` reads it, or the model's own if it is another."""
    if save_tokenizer(clip, place):
        return
    vocabulary, ranks, marks = clip.vocabulary, clip._tokenizer.bpe_ranks, dict(MARKS.values())
    _write(place / "vocab.json", {marks.get(token, token): row for token, row in vocabulary.items()}, sort_keys=False)
    merges = "".join(f"{' '.join(pair)}\n" for pair in sorted(ranks, key=ranks.get))
    (place / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
    start, end = (theirs for _, theirs in MARKS.values())
    special = {"bos_token": start, **dict.fromkeys(("eos_token", "pad_token", "unk_token"), end)}
    _write(place / "special_tokens_map.json", special)
    length = {"model_max_length": clip.room, "do_lower_case": True}
    _write(place / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special, **length})


def _write(file: Path, content: Mapping[str, Any], *, sort_keys: bool = True) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n", "utf-8")

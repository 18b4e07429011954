"""A CLIP of transformers is the same function here, and what is written for transformers is the same one there."""

import json
import shutil

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from calling import call
from conftest import tiny_clip
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage, save_checkpoint
from rayclip.models.exporting import export_model
from rayclip.models.image import class_token_tower
from rayclip.models.imports import import_model
from rayclip.models.prompts import WithContext
from rayclip.models.text import causal_tower
from rayclip.models.transformers_layout import model_cfg
from rayclip.types import UserError
from tiny_generators import WORDS, tokenizer

IMAGE = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE |= {"image_size": 8, "patch_size": 4}
TEXT = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 16, "vocab_size": 49408}
TEXTS = ["a photo of a dog", "", "It's 42 cats, isn't it?", "a photo of a " + "house " * 30]
PIXELS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OLD = {"eos_token_id": 2, "bos_token_id": 0}  # as in OpenAI's own repositories
MODELS = {
    "quick_gelu, tied sizes, old end mark": (
        {"num_attention_heads": 2},
        {"hidden_size": 32, "intermediate_size": 128, **OLD},
        32,
    ),
    "gelu": ({"hidden_act": "gelu", "intermediate_size": 50}, {"hidden_act": "gelu", "intermediate_size": 50}, 16),
    "tanh": ({"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}, 16),
    "more tokens than used": ({}, {"vocab_size": 49500}, 16),
}


def tiny(image=(), text=(), dim=16):
    torch.manual_seed(0)
    text = {**TEXT, **dict(text)}
    model = CLIPModel(CLIPConfig(vision_config={**IMAGE, **dict(image)}, text_config=text, projection_dim=dim)).eval()
    for name, p in model.named_parameters():  # their start is so small that the embeddings are all alike
        if name != "logit_scale":
            nn.init.normal_(p, std=1 if "norm" in name or "embedding" in name else 0.3)
    return model


def saved(model, folder, **processor):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 8, "crop_size": 8, **processor}))
    return f"local-dir:{folder}"


def theirs(model, pixels, rows, mean, std):
    """What a transformers model gives for pixels in [0, 1] and token rows, whatever the version returns it in."""
    with torch.no_grad():
        found = model.get_image_features((pixels - mean) / std), model.get_text_features(rows)
    return [getattr(each, "pooler_output", each) for each in found]


def same(clip, model, rows=None):
    images, texts = theirs(model, PIXELS, clip.token_rows(TEXTS) if rows is None else rows, clip.mean, clip.std)
    with torch.no_grad():
        assert (clip.encode_image(PIXELS, normalize=False) - images).abs().max() < 1e-5 < images.std()
        assert (clip.encode_text(clip.tokenize(TEXTS), normalize=False) - texts).abs().max() < 1e-5 < texts.std()
        assert (clip.embed_texts(TEXTS) - nn.functional.normalize(texts, dim=-1)).abs().max() < 1e-5
    assert (clip.scale - model.logit_scale.exp()).abs() < 1e-5
    return True


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_a_model_of_transformers_goes_in_and_out(sizes, tmp_path):
    model = tiny(*sizes)
    clip = load_model(saved(model, tmp_path / "in", image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]))
    assert clip.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3]) and clip.image_size == 8
    assert class_token_tower(clip.model) is not None and causal_tower(clip.model) is not None, (
        "the fast passes serve it"
    )
    assert same(clip, model)
    save_checkpoint(clip, tmp_path / "ours", {})
    assert load_model(f"local-dir:{tmp_path}/ours").fingerprint() == clip.fingerprint()
    export_model(clip, tmp_path / "out", "transformers", {})
    assert same(clip, CLIPModel.from_pretrained(tmp_path / "out"))
    again = load_model(f"local-dir:{tmp_path}/out")
    assert again.fingerprint() == clip.fingerprint() and again.config == clip.config


def test_the_exported_processor_reads_what_rayclip_reads(tmp_path):
    clip = tiny_clip(quick_gelu=True)
    export_model(clip, tmp_path, "transformers", {})
    processor, model = CLIPProcessor.from_pretrained(tmp_path), CLIPModel.from_pretrained(tmp_path)
    image = Image.fromarray((PIXELS[0] * 255).byte().permute(1, 2, 0).numpy())
    read = processor(text=TEXTS, images=image, return_tensors="pt", padding="max_length", truncation=True)
    ours = (PIXELS[:1] * 255).byte() / 255
    assert ((ours - clip.mean) / clip.std - read["pixel_values"]).abs().max() < 1e-5
    assert same(clip, model, read["input_ids"])
    assert same(load_model(f"local-dir:{tmp_path}"), model)


def test_a_folder_with_a_vocabulary_of_its_own(tmp_path):
    model = tiny(text={"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1})
    words = tokenizer(chat=False, framed=True)
    words.save_pretrained(tmp_path / "in")
    rows = words(TEXTS, return_tensors="pt", padding="max_length", truncation=True, max_length=16)["input_ids"]
    clip = load_model(saved(model, tmp_path / "in"))
    save_checkpoint(clip, tmp_path / "ours", {})
    export_model(clip, tmp_path / "out", "transformers", {})
    for spec in ("in", "ours", "out"):
        assert same(load_model(f"local-dir:{tmp_path / spec}"), model, rows)
    shutil.rmtree(tmp_path / "in")
    saved(model, tmp_path / "in")
    with pytest.raises(UserError, match="tokenizer"):
        load_model(f"local-dir:{tmp_path / 'in'}")


def test_clips_own_vocabulary_is_recognised_in_a_folder(tmp_path):
    """Then nothing but open_clip's own tokenizer is needed, whose words BERT-Attack uses."""
    spec = saved(tiny(), tmp_path)
    own = open_clip.SimpleTokenizer()
    vocabulary = dict(own.encoder)
    vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"] = (
        vocabulary.pop("<start_of_text>"),
        vocabulary.pop("<end_of_text>"),
    )
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in own.bpe_ranks))
    assert CLIPTokenizer.from_pretrained(tmp_path)("a dog").input_ids == [49406, 320, 1929, 49407]
    clip = load_model(spec)
    assert "dog</w>" in clip.vocabulary and "hf_tokenizer_name" not in clip.config["model_cfg"]["text_cfg"]


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    """Read from the hub's cache in its layout, in several files; the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached, model = tmp_path / "models--lab--clip", tiny()
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text("1" * 40)
    model.save_pretrained(cached / "snapshots" / ("1" * 40), max_shard_size="500KB")
    assert len(list(cached.glob("snapshots/*/*.safetensors"))) > 1
    assert same(load_model("hf:lab/clip@v1"), model)
    clip, lineage = import_model("hf:lab/clip@v1", None)
    assert lineage["imported"]["fingerprint"] == clip.fingerprint()
    for spec in ("hf:lab/clip", "hf:lab/other", f"hf:{tmp_path}", "hf:clip"):
        with pytest.raises(UserError):
            load_model(spec)


@pytest.mark.parametrize("is_bare", [False, True], ids=["ours", "transformers' own, without a projection"])
def test_an_image_tower_alone_goes_out_and_in(is_bare, tmp_path):
    base, tuned = tiny_clip(quick_gelu=True), tiny_clip(1, quick_gelu=True)
    save_checkpoint(base, tmp_path / "base", {})
    export_model(tuned, tmp_path / "out", "transformers-vision", {})
    tower = CLIPVisionModel.from_pretrained(tmp_path / "out")
    projected = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out")
    x = (PIXELS - tuned.mean) / tuned.std
    with torch.no_grad():
        own = tuned.encode_image(PIXELS, normalize=False)
        assert (projected(x).image_embeds - own).abs().max() < 1e-5
        assert (tower(x).pooler_output @ tuned.model.visual.proj - own).abs().max() < 1e-5
    if is_bare:
        tower.save_pretrained(tmp_path / "out")
        weights = {
            name.removeprefix("vision_model."): x for name, x in load_file(tmp_path / "out/model.safetensors").items()
        }
        save_file(
            weights, tmp_path / "out/model.safetensors", {"format": "pt"}
        )  # as version 5 names them, from a config
        own = tower(x).pooler_output @ base.model.visual.proj
    clip, lineage = import_model(str(tmp_path / "out"), f"local-dir:{tmp_path}/base")
    assert lineage["imported"]["part"] == "image"
    assert (clip.encode_image(PIXELS, normalize=False) - own).abs().max() < 1e-5
    assert torch.equal(clip.embed_texts(TEXTS), base.embed_texts(TEXTS))
    save_checkpoint(tiny_clip(), tmp_path / "gelu", {})
    for bad in ("local-dir:gelu", "digits"):
        with pytest.raises(UserError):
            import_model(str(tmp_path / "out"), bad.replace("gelu", f"{tmp_path}/gelu"))
    with pytest.raises(UserError, match="image tower alone"):
        load_model(f"local-dir:{tmp_path}/out")


@pytest.mark.parametrize(
    ("image", "text", "processor"),
    [
        ({"hidden_act": "relu"}, {"hidden_act": "relu"}, {}),
        ({"hidden_act": "gelu"}, {}, {}),
        ({"num_channels": 1}, {}, {}),
        ({}, {}, {"size": 16, "crop_size": 16}),
    ],
    ids=["relu", "two activations", "grey", "processor of another size"],
)
def test_models_that_cannot_be_read_are_refused(image, text, processor, tmp_path):
    with pytest.raises(UserError):
        load_model(saved(tiny(image, text), tmp_path, **processor))


@pytest.mark.parametrize(
    "damage", ["{}", '{"model_type": "siglip"}', '{"model_type": "clip", "projection_dim": "x"}', "no"]
)
def test_damaged_folders_are_refused(damage, tmp_path):
    spec = saved(tiny(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(UserError):
        load_model(spec)
    (tmp_path / "config.json").write_text(config)
    weights = load_file(tmp_path / "model.safetensors")
    for lost in ("text_model.final_layer_norm.bias", "vision_model.encoder.layers.1.self_attn.k_proj.weight"):
        save_file({n: x for n, x in weights.items() if n != lost}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="missing"):
            load_model(spec)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(spec)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision_cfg", {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"timm_model_name": "test_vit"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"proj_bias": True}),
    ],
    ids=str,
)
def test_what_transformers_cannot_be_is_not_written(part, changes, tmp_path):
    clip = tiny_clip()
    clip.config = json.loads(json.dumps(clip.config))
    clip.config["model_cfg"][part].update(changes)
    with pytest.raises(UserError, match="none that transformers' CLIP can be"):
        export_model(clip, tmp_path / "out", "transformers", {})
    with pytest.raises(UserError):
        export_model(WithContext.begin(tiny_clip(), 2, 0), tmp_path / "out", "open_clip", {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14-336-quickgelu", "ViT-H-14"])
def test_configurations_are_open_clips_own(name):
    """So a published model has one fingerprint, from whichever of the two it is read."""
    own = open_clip.get_model_config(name)
    image, text = own["vision_cfg"], own["text_cfg"]
    act = {"hidden_act": "quick_gelu" if own.get("quick_gelu") else "gelu"}
    config = CLIPConfig(
        projection_dim=own["embed_dim"],
        vision_config=act
        | {"hidden_size": image["width"], "intermediate_size": 4 * image["width"], "image_size": image["image_size"]}
        | {"num_hidden_layers": image["layers"], "num_attention_heads": image["width"] // image.get("head_width", 64)}
        | {"patch_size": image["patch_size"]},
        text_config=act
        | {"hidden_size": text["width"], "intermediate_size": 4 * text["width"], "num_hidden_layers": text["layers"]}
        | {"num_attention_heads": text["heads"]},
    )
    assert model_cfg(config, name) == own


def test_the_command_writes_each_layout(tmp_path, monkeypatch, capsys):
    save_checkpoint(tiny_clip(quick_gelu=True), tmp_path / "ours", {"method": {"name": "tecoa"}})
    for layout in ("transformers", "transformers-vision", "open_clip"):
        for _ in range(2):
            out = tmp_path / layout
            code, _, err = call(monkeypatch, capsys, "export", tmp_path / "ours", "--format", layout, "--out", out)
            assert code == 0, err
        assert read_lineage(out)["method"] == {"name": "tecoa"} and read_lineage(out)["exported"]["format"] == layout
    assert load_model(f"local-dir:{out}").fingerprint() == tiny_clip(quick_gelu=True).fingerprint()
    code, _, err = call(monkeypatch, capsys, "export", "digits", "--format", "open_clip", "--out", out)
    assert code == 2 and "another" in err
    assert transformers.AutoModel.from_pretrained(tmp_path / "transformers").config.model_type == "clip"

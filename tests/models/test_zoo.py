"""The zoo: every row loads from a miniature of its layout, in the hub's cache or a folder of the user's, offline."""

import csv
import dataclasses
import hashlib
import json

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from transformers import CLIPConfig, CLIPModel

from calling import call
from conftest import TINY, tiny_clip
from rayclip.models import load_model
from rayclip.models.checkpoint import model_record, save_checkpoint
from rayclip.models.imports import import_model
from rayclip.models.opening import load_published
from rayclip.models.zoo import check_available, find_published, zoo
from rayclip.types import UserError

PIXELS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a cat", "a sea lion"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sea", "lion"]
# A text tower as CLIPA's: it sees both ways, is read at its last position, and its padding takes the end mark's place
BERT_TEXT = {
    "context_length": 8,
    "vocab_size": 16,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "pool_type": "last",
    "no_causal_mask": True,
    "vocab_path": "/somewhere/bert_base_vocab.txt",
}
THEIR_IMAGES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
}
THEIR_TEXTS = {
    "vocab_size": 49408,
    "max_position_embeddings": 16,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "bos_token_id": 49406,
    "pad_token_id": 49407,
}
CONVNEXT = {
    "timm_model_name": "convnext_atto",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 32,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, without network; returns the folder of a repository's commit, made."""
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def repository(name, commit="1" * 40):
        cached = tmp_path / "hub" / f"models--{name.removeprefix('hf-hub:').replace('/', '--')}"
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        return cached / "snapshots" / commit

    return repository


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tokenizer of transformers with nine words."""
    place = tmp_path_factory.mktemp("bert")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    (place / "config.json").write_text('{"model_type": "bert"}')
    return place


def with_openai_pixels(clip):
    """Normalise as OpenAI's models do."""
    clip.mean[:] = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    clip.std[:] = torch.tensor([0.26862954, 0.2613026, 0.2757771]).view(3, 1, 1)
    mean, std = (each.flatten().tolist() for each in (clip.mean, clip.std))
    clip.config["preprocess_cfg"] = {**clip.config["preprocess_cfg"], "mean": mean, "std": std}
    return clip


def miniature(row, hub, tmp_path, bert):
    """Put a miniature of the row's checkpoint where the row says; returns the row for it, and what it must compute."""
    row, quick = dataclasses.replace(row, image_size=8), row.activation == "quickgelu"
    if row.layout == "image-tower":
        base, source = (with_openai_pixels(tiny_clip(seed, quick_gelu=quick)) for seed in (0, 1))
        save_checkpoint(base, tmp_path / "base", {})
        row = dataclasses.replace(row, base=f"local-dir:{tmp_path / 'base'}")
        file = (hub(row.source) if row.is_on_hub else tmp_path) / row.file
        torch.save(source.model.visual.state_dict(), file)
        if not row.is_on_hub:
            clip, lineage = import_model(str(file), row.base)
            save_checkpoint(clip, row.own_folder, lineage)
        return row, source.encode_image(PIXELS), base.embed_texts(TEXTS)
    folder = hub(row.source)
    if row.layout == "transformers":
        model = CLIPModel(CLIPConfig(vision_config=THEIR_IMAGES, text_config=THEIR_TEXTS, projection_dim=16)).eval()
        for name, p in model.named_parameters():  # their start is so small that all embeddings are alike
            if name != "logit_scale":
                torch.nn.init.normal_(p, std=1 if "norm" in name or "embedding" in name else 0.3)
        model.save_pretrained(folder)
        clip = with_openai_pixels(tiny_clip(0))
        found = model(pixel_values=clip.tower_input(PIXELS), input_ids=clip.token_rows(TEXTS))
        return row, found.image_embeds, found.text_embeds
    if row.tokenizer:
        config = {**TINY["model_cfg"], "text_cfg": BERT_TEXT}
        torch.manual_seed(1)
        known = {key: value for key, value in BERT_TEXT.items() if key != "vocab_path"}
        model = CLIP(16, config["vision_cfg"], known).eval()
        torch.nn.init.normal_(model.token_embedding.weight)
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        (folder / "open_clip_config.json").write_text(json.dumps({**TINY, "model_cfg": config}))
        row = dataclasses.replace(row, tokenizer=str(bert))
        mean, std = (torch.tensor(TINY["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
        tokens = torch.tensor([[2, 5, 6, 0, 0, 0, 0, 0], [2, 5, 7, 8, 0, 0, 0, 0]])  # no [SEP]
        return row, model.encode_image((PIXELS - mean) / std, normalize=True), model.encode_text(tokens, normalize=True)
    source = tiny_clip(1, quick_gelu=quick, **({"vision_cfg": CONVNEXT} if "convnext" in row.architecture else {}))
    source.config["preprocess_cfg"] = {**TINY["preprocess_cfg"], "mean": [0.1] * 3, "std": [0.9] * 3}  # not the row's
    source.config["model_cfg"].pop("quick_gelu", None)  # nor is the activation
    row = dataclasses.replace(row, image_size=source.image_size)
    save_checkpoint(source, folder, {})
    with_openai_pixels(source)
    return row, source.encode_image(PIXELS), source.embed_texts(TEXTS)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, row in zoo().items() if row.layout != "transformers"])
def test_every_row_loads_from_a_miniature_of_its_layout(name, hub, tmp_path, bert):
    row, images, texts = miniature(zoo()[name], hub, tmp_path, bert)
    clip = load_published(row)
    assert clip.spec == f"zoo:{name}" and clip.image_size == row.image_size
    torch.testing.assert_close(clip.encode_image(PIXELS), images, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(clip.embed_texts(TEXTS), texts, atol=1e-6, rtol=1e-6)
    assert clip.config["model_cfg"].get("quick_gelu", False) == (row.activation == "quickgelu")


def test_revision_hash_and_mirror_of_a_row_count(hub, tmp_path, bert):
    row, _, _ = miniature(zoo()["simclip2-vit-l-14"], hub, tmp_path, bert)
    kept = hub("hf-hub:lab/copy", commit="2" * 40)
    torch.save(tiny_clip(2, quick_gelu=True).model.visual.state_dict(), kept / row.file)
    (kept.parents[1] / "refs" / "main").unlink()
    at = {"mirrors": "hf-hub:lab/none hf-hub:lab/copy", "revision": "2" * 40}
    mirrored = dataclasses.replace(row, source="https://gone.example/x.pt", **at)
    clip = load_published(mirrored)
    assert clip.fingerprint() != load_published(row).fingerprint()
    digest = hashlib.sha256((kept / row.file).read_bytes()).hexdigest()
    assert load_published(dataclasses.replace(mirrored, sha256=digest)).fingerprint() == clip.fingerprint()
    with pytest.raises(UserError, match="SHA-256"):
        load_published(dataclasses.replace(mirrored, sha256="0" * 64))
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_published(dataclasses.replace(mirrored, revision="3" * 40))


def test_a_checkpoint_of_another_image_size_is_refused(hub, tmp_path, bert):
    row, _, _ = miniature(zoo()["fare4-vit-l-14"], hub, tmp_path, bert)
    with pytest.raises(UserError, match="8 pixels"):
        load_published(dataclasses.replace(row, image_size=224))


@pytest.mark.parametrize("name", zoo())
def test_what_cannot_be_downloaded_says_where_it_is_and_how_to_import_it(name, hub):
    with pytest.raises(UserError) as refused:
        load_model(f"zoo:{name}")
    sentence, row = str(refused.value), zoo()[name]
    assert row.link in sentence and row.page in sentence and str(row.own_folder) in sentence and "\n" not in sentence
    assert ("rayclip import" in sentence) == (row.layout == "image-tower")
    if not row.is_on_hub:
        with pytest.raises(UserError, match="rayclip import"):
            check_available(f"zoo:{name}")


def test_rows_state_what_open_clip_knows_and_what_was_handed_over(shared):
    theirs = {row["name"]: row for row in csv.DictReader((shared / "zoo.csv").open())}
    assert set(zoo()) == set(theirs)
    for name, row in zoo().items():
        published = theirs[name]
        assert row.architecture in open_clip.list_models() and row.paper and row.page and row.licence
        architecture, _, tag = row.base.partition(":")
        assert not tag or tag in open_clip.list_pretrained_tags_by_model(architecture)
        assert row.activation == "quickgelu" if row.base.endswith(":openai") else row.activation in ("gelu", "")
        columns = ("clean_avg13", "robust_1_avg13", "robust_2_avg13", "robust_4_avg13")
        numbers = [float(published[column]) if published[column] else None for column in columns]
        assert [row.clean, row.robust_1, row.robust_2, row.robust_4] == numbers
        assert (str(row.image_size), row.method) == (published["image_size"], published["method"])


def test_results_know_where_a_model_of_the_zoo_comes_from():
    record = model_record("zoo:fare4-vit-l-14")
    assert record["lineage"]["config"] == {
        "model": "ViT-L-14:openai",
        "data": "imagenet",
        "method": {"name": "fare", "eps": 4 / 255},
    }
    assert record["lineage"]["zoo"]["link"] == "https://huggingface.co/chs20/fare4-clip"


def test_the_command_line_lists_shows_and_refuses(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path))
    code, out, _ = call(monkeypatch, capsys, "models", "list", "--json", "-")
    assert code == 0 and {row["name"] for row in json.loads(out)} == set(zoo())
    code, out, _ = call(monkeypatch, capsys, "models", "list")
    assert code == 0 and all(row.source in out and f" {row.clean or ''} " in out for row in zoo().values())
    code, out, _ = call(monkeypatch, capsys, "models", "show", "zoo:fare4-vit-b-32-openai")
    assert code == 0 and "48.6" in out and "rayclip import vitb32_fare_eps_4.pt --base ViT-B-32:openai" in out
    for wrong in ("zoo:fare5-vit-l-14", "zoo:fare4-vit-b-32-openai"):
        code, _, err = call(
            monkeypatch, capsys, "eval", "--model", wrong, "--data", "digits", "--eps", "1/255", "--out", "x"
        )
        assert code == 2 and wrong in err and err.count("\n") == 1
    assert find_published("fare4-vit-l-14") is find_published("zoo:fare4-vit-l-14")

import json

import open_clip
import pytest
import torch

from conftest import text_rows, tiny_clip
from rayclip.models import ZeroShot, class_prompts, load_model
from rayclip.models.checkpoint import read_lineage, save_checkpoint
from rayclip.models.loading import CONFIG_FILE, WEIGHTS_FILE
from rayclip.types import UserError


def test_a_saved_model_is_what_plain_open_clip_loads(clip, tmp_path):
    """Equal outputs, through open_clip's own loading, preprocessing statistics and tokenizer."""
    save_checkpoint(clip, tmp_path / "m", {"method": "none"})
    spec = f"local-dir:{tmp_path / 'm'}"
    plain, _, preprocess = open_clip.create_model_and_transforms(spec)
    plain.eval()
    ours = load_model(spec)
    pixels, texts = torch.rand(5, 3, 8, 8), ["a cat", "This is a photo of a dog"]
    normalise = preprocess.transforms[-1]
    with torch.no_grad():
        assert torch.allclose(
            ours.encode_image(pixels), plain.encode_image(normalise(pixels), normalize=True), atol=1e-6
        )
        tokens = open_clip.get_tokenizer(spec)(texts)
        rows = ours.tokenize(texts)
        assert torch.equal(tokens[:, : rows.shape[1]], rows) and not tokens[:, rows.shape[1] :].any()
        assert torch.allclose(ours.embed_texts(texts), plain.encode_text(tokens, normalize=True), atol=1e-6)
    assert ours.fingerprint() == clip.fingerprint()
    assert read_lineage(tmp_path / "m") == {"method": "none"}
    assert not list(tmp_path.glob(".*")), "nothing half-written is left beside the checkpoint"


def test_quick_gelu_survives_a_round_trip(tmp_path):
    clip = tiny_clip(quick_gelu=True)
    save_checkpoint(clip, tmp_path / "m", {})
    again = load_model(f"local-dir:{tmp_path / 'm'}")
    pixels = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), clip.encode_image(pixels))
    plain_gelu = tiny_clip()
    plain_gelu.model.load_state_dict(clip.model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(plain_gelu.encode_image(pixels), clip.encode_image(pixels), atol=1e-3)


def test_openai_weights_get_quick_gelu(tmp_path, monkeypatch):
    """`NAME:openai` builds QuickGELU though `NAME` alone means GELU, and a saved copy keeps it."""
    config = tiny_clip().config["model_cfg"]
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    torch.save(tiny_clip(quick_gelu=True).model.state_dict(), tmp_path / "weights.pt")
    tags = {"openai": {"url": "", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", tags)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: str(tmp_path / "weights.pt"))
    loaded = load_model("tiny-test:openai")
    assert loaded.config["model_cfg"]["quick_gelu"] is True
    assert loaded.mean.flatten().tolist() == [0.5] * 3
    save_checkpoint(loaded, tmp_path / "m", {})
    pixels = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_model(f"local-dir:{tmp_path / 'm'}").encode_image(pixels), loaded.encode_image(pixels))


@pytest.mark.parametrize("size", [5, 8, 20])
def test_native_resolution_is_resized_differentiably(clip, size):
    pixels = torch.rand(2, 3, size, size, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip.encode_image(pixels)[:, 0].sum(), pixels)
    assert gradient.shape == pixels.shape and (gradient.abs().flatten(1).sum(1) > 0).all()


def test_class_prompts_clean_the_names():
    assert class_prompts(["Egyptian_Cat", "sea-lion", "AC/DC"]) == [
        "This is a photo of a egyptian cat",
        "This is a photo of a sea lion",
        "This is a photo of a ac dc",
    ]


def test_class_embeddings_are_computed_once(clip):
    with text_rows(clip) as seen:
        victim = ZeroShot(clip, ["cat", "dog"])
        for _ in range(3):
            victim(torch.rand(2, 3, 8, 8))
    assert len(seen) == 1


def test_the_temperature_is_bounded(clip):
    with torch.no_grad():
        clip.model.logit_scale.fill_(9.0)
    assert clip.scale.item() == pytest.approx(100.0)
    clip.bound_scale()
    clip.scale.backward()
    assert clip.model.logit_scale.grad.item() == pytest.approx(100.0, rel=1e-4), (
        "a scale on the bound can still be lowered"
    )


def test_the_temperature_of_a_siglip_has_no_bound():
    clip = tiny_clip(init_logit_bias=-10)
    with torch.no_grad():
        clip.model.logit_scale.fill_(4.77)
    clip.bound_scale()
    assert clip.scale.item() == pytest.approx(117.9, abs=0.1) and clip.bias is clip.model.logit_bias


def names_of(clip, part):
    chosen = {id(p) for p in clip.parameters_of(part)}
    return {name for name, p in clip.model.named_parameters() if id(p) in chosen}


def test_the_parts_of_a_model(clip):
    every = {name for name, _ in clip.model.named_parameters()}
    image = {name for name in every if name.startswith("visual.")}
    after = {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    blocks = [{n for n in image if n.startswith(f"visual.transformer.resblocks.{i}.")} for i in range(2)]
    assert names_of(clip, "all") == every and names_of(clip, "image") == image
    assert names_of(clip, "last-1") == blocks[1] | after
    assert names_of(clip, "last-2") == blocks[0] | blocks[1] | after
    assert blocks[0] and blocks[1] and {"visual.conv1.weight", "visual.class_embedding"} <= image - blocks[0]


def test_the_last_blocks_of_a_timm_tower():
    vision = {"image_size": 16, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    clip = tiny_clip(vision_cfg=vision)
    last = f"visual.trunk.blocks.{len(clip.model.visual.trunk.blocks) - 1}."
    names = names_of(clip, "last-1")
    assert len([n for n in names if n.startswith(last)]) == 12
    assert {n for n in names if not n.startswith(last)} == {
        *("visual.trunk.norm.weight", "visual.trunk.norm.bias", "visual.head.proj.weight")
    }


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("last-3", {}, "has 2 transformer blocks: write last-2 or less"),
        ("last-0", {}, "all, image, text, or last-N"),
        ("last-1", {"vision_cfg": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}}, "no transformer blocks"),
    ],
)
def test_parts_that_a_model_does_not_have_are_explained(part, changes, match):
    with pytest.raises(UserError, match=match):
        tiny_clip(**changes).parameters_of(part)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("nonsense", "unknown model"),
        ("ViT-B-32", "needs its weights named: write ViT-B-32:TAG"),
        ("ViT-B-32:opanai", "has no weights 'opanai': .*openai"),
        ("local-dir:/no/such/place", "no file open_clip_config.json"),
    ],
)
def test_bad_specifications_are_explained(spec, match):
    with pytest.raises(UserError, match=match):
        load_model(spec)


def test_weights_of_another_shape_are_explained(saved_clip, tmp_path):
    folder = tmp_path / "tiny"
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 64
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UserError, match="fit"):
        load_model(saved_clip)


def test_damaged_weights_are_explained(saved_clip, tmp_path):
    (tmp_path / "tiny" / WEIGHTS_FILE).write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="damaged"):
        load_model(saved_clip)


def test_the_bundled_model_is_small_and_good():
    from rayclip.models.loading import BUNDLED
    from rayclip.training.pretrain_digits import accuracy

    assert sum(f.stat().st_size for f in BUNDLED["digits"].iterdir()) <= 8e6
    assert accuracy(load_model("digits")) >= 95


@pytest.mark.ci
def test_two_rebuilds_of_the_bundled_model_are_the_same_bytes():
    from rayclip.training.pretrain_digits import pretrain

    threads = torch.get_num_threads()
    try:
        assert pretrain(epochs=1).fingerprint() == pretrain(epochs=1).fingerprint()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)

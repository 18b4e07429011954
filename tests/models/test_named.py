"""A checkpoint names its model, and nothing beyond its surroundings."""

import json
import os
from pathlib import Path

import pytest

from conftest import tiny_clip
from rayclip.models import load_model
from rayclip.models.checkpoint import LINEAGE_FILE, save_checkpoint
from rayclip.models.loading import CONFIG_FILE
from rayclip.models.named import ROOTS, allow, check_named, check_towers
from rayclip.models.prompts import WithFrame
from rayclip.types import UserError


@pytest.fixture
def prompt(tmp_path, monkeypatch) -> Path:
    """A learned prompt that was copied away from its model; its lineage may be rewritten."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop(ROOTS, None)
    save_checkpoint(tiny_clip(), tmp_path / "models" / "tiny", {})
    base = load_model(f"local-dir:{tmp_path / 'models' / 'tiny'}")
    save_checkpoint(WithFrame.begin(base), tmp_path / "runs" / "p", {})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "runs" / "p"


def name(prompt: Path, base: object) -> None:
    about = json.loads((prompt / LINEAGE_FILE).read_text())
    about["prompt"]["base"] = base
    (prompt / LINEAGE_FILE).write_text(json.dumps(about))


def test_a_model_outside_is_opened_only_if_the_user_names_its_place(prompt, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"{ROOTS}={tmp_path / 'models'}"):
        load_model(f"prompted:{prompt}")
    monkeypatch.setitem(os.environ, ROOTS, str(tmp_path / "models"))
    assert load_model(f"prompted:{prompt}").spec == f"prompted:{prompt}"


def test_a_model_that_the_user_named_may_be_named(prompt, tmp_path):
    allow(f"mix:digits+local-dir:{tmp_path / 'models' / 'tiny'}@0.5")
    allow("ViT-B-32:openai")
    assert os.environ[ROOTS] == str(tmp_path / "models" / "tiny")
    load_model(f"prompted:{prompt}")


def test_beside_the_prompt_and_below_the_working_directory_are_its_surroundings(prompt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_model(f"prompted:{prompt}")
    monkeypatch.chdir("/")
    (tmp_path / "models" / "tiny").rename(tmp_path / "runs" / "tiny")
    name(prompt, f"local-dir:{tmp_path / 'runs' / 'tiny'}")
    monkeypatch.chdir(tmp_path / "work")
    load_model(f"prompted:{prompt}")


def test_a_link_and_dots_do_not_lead_out(prompt, tmp_path):
    (prompt.parent / "link").symlink_to(tmp_path / "models" / "tiny")
    for base in (f"local-dir:{prompt.parent}/link", f"local-dir:{prompt.parent}/p/../../models/tiny"):
        name(prompt, base)
        with pytest.raises(UserError, match="outside"):
            load_model(f"prompted:{prompt}")


@pytest.mark.parametrize(
    "base",
    [
        "prompted:{prompt}",
        "prompted:elsewhere",
        "ViT-B-32:/etc/passwd",
        "ViT-B-32:../weights.pt",
        "ViT-B-32:weights.pt",
        "hf-hub:../../etc",
        "hf-hub:org/name/../../x",
        "https://evil.example/model",
        "",
    ],
)
def test_what_no_checkpoint_may_name(prompt, base):
    Path("weights.pt").write_bytes(b"")
    with pytest.raises(UserError):
        check_named(base.format(prompt=prompt), prompt)
    name(prompt, base.format(prompt=prompt))
    with pytest.raises(UserError):
        load_model(f"prompted:{prompt}")


@pytest.mark.parametrize("base", ["local-dir:/etc", "mix:digits+local-dir:/etc@0.5", "mix:digits+prompted:x@0.5"])
def test_no_way_round(prompt, base):
    with pytest.raises(UserError):
        check_named(base, prompt)


@pytest.mark.parametrize(
    "base", ["digits", "ViT-B-32:openai", "hf-hub:org/name", "hf-hub:org/na.me@main", "mix:digits+ViT-B-32:openai@0.5"]
)
def test_published_models_may_be_named(prompt, base):
    check_named(base, prompt)


@pytest.mark.parametrize(
    "lineage", ["[]", '{"prompt": 3}', '{"prompt": {"kind": "frame", "base": 3}}', "{", "9" * 5000]
)
def test_a_damaged_lineage_is_one_sentence(prompt, lineage):
    (prompt / LINEAGE_FILE).write_text(lineage)
    with pytest.raises(UserError):
        load_model(f"prompted:{prompt}")


def rename_tower(folder: Path, part: str, key: str, name: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"][part] = {**config["model_cfg"][part], key: name}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["/etc", "../x", "a/b/c", "local-dir:/etc", "https://h/x", "./x", "~/x", "a/..", 7])
@pytest.mark.parametrize("key", ["vision_cfg timm_model_name", "text_cfg hf_model_name", "text_cfg hf_tokenizer_name"])
def test_a_configuration_names_towers_and_no_places(saved_clip, key, name):
    rename_tower(Path(saved_clip.removeprefix("local-dir:")), *key.split(), name)
    with pytest.raises(UserError, match=key.split()[1]):
        load_model(saved_clip)


def test_a_published_tower_may_be_named(saved_clip):
    folder = Path(saved_clip.removeprefix("local-dir:"))
    for name in ("roberta-base", "timm/ViT-B-16-SigLIP", "vit_medium_patch16_gap_256", "hf-hub:timm/vit@main"):
        check_towers({"model_cfg": {"vision_cfg": {"timm_model_name": name}, "text_cfg": {}}}, folder)
    for odd in (None, [], {"model_cfg": 1}, {"model_cfg": {"vision_cfg": None}}):
        check_towers(odd, folder)

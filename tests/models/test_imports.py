"""Checkpoints of the field, written here in exactly the layouts that its code writes, from a tiny CLIP."""

import json
import os
import subprocess
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from conftest import tiny_clip
from rayclip.models import load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.models.imports import import_model
from rayclip.models.weights import read_weights
from rayclip.types import UserError

TEXTS = ["This is a photo of a cat", "This is a photo of a sea lion"]


def prefixed(state):
    return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())


def tecoa(clip, *, parallel=False, precision=torch.float32):
    """`save_checkpoint` of TeCoA's code, which PMG-AFT's, TGA-ZSR's and SAFT's have taken over. The learning rate comes
    from a cosine of numpy's, the best accuracy from a mean of numpy's."""
    tower = clip.model.visual
    optimizer = torch.optim.SGD(tower.parameters(), lr=1e-4, momentum=0.9)
    sum(p.sum() for p in tower.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.5 * (1 + np.cos(np.pi * 0.3)) * 1e-4
    state = OrderedDict((k, v.to(precision)) for k, v in tower.state_dict().items())
    return {
        "epoch": 10,
        "state_dict": OrderedDict(),
        "add_prompter": OrderedDict(),
        "best_acc1": np.mean([61.5, 62.25]),
        "optimizer": optimizer.state_dict(),
        "vision_encoder_state_dict": prefixed(state) if parallel else state,
    }


def mmcoa(clip):
    """MMCoA's: the whole CLIP inside `DataParallel`."""
    return {"model": prefixed(clip.model.state_dict()), "epoch": 27}


def robustvlm(clip):
    """RobustVLM's `final.pt`: the image tower's state dict and nothing around it."""
    return clip.model.visual.state_dict()


LAYOUTS = {
    "tecoa": (tecoa, "image", "vision_encoder_state_dict"),
    "tecoa-parallel": (lambda clip: tecoa(clip, parallel=True), "image", "vision_encoder_state_dict"),
    "mmcoa": (mmcoa, "whole", "model"),
    "robustvlm": (robustvlm, "image", "state dict"),
    "openai": (lambda clip: clip.model.state_dict(), "whole", "state dict"),
}


@pytest.fixture
def base(tmp_path):
    """The model that was fine-tuned: QuickGELU, as OpenAI's."""
    save_checkpoint(tiny_clip(0, quick_gelu=True), tmp_path / "base", {})
    return f"local-dir:{tmp_path / 'base'}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_an_imported_model_computes_what_its_source_does(base, tmp_path, layout, legacy):
    write, part, name = LAYOUTS[layout]
    source, file = tiny_clip(1, quick_gelu=True), tmp_path / "checkpoint.pth.tar"
    content = write(source)
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    clip, lineage = import_model(str(file), base)
    save_checkpoint(clip, tmp_path / "out", lineage)
    again = load_model(f"local-dir:{tmp_path / 'out'}")
    pixels = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), source.encode_image(pixels))
        texts = source if part == "whole" else load_model(base)
        assert torch.equal(again.embed_texts(TEXTS), texts.embed_texts(TEXTS))
        assert not torch.equal(again.encode_image(pixels), load_model(base).encode_image(pixels))
    found = json.loads((tmp_path / "out" / "rayclip.json").read_text())["imported"]
    digest = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
    tower = source.model if part == "whole" else source.model.visual
    assert found == {
        "source": "checkpoint.pth.tar",
        "sha256": digest,
        "layout": name,
        "prefix": "module." if layout in ("tecoa-parallel", "mmcoa") else "",
        "part": part,
        "keys": len(tower.state_dict()),
        "left": [k for k in content if k != name] if name != "state dict" else [],
        "base": base,
        "base_fingerprint": load_model(base).fingerprint(),
    }


def test_half_precision_weights_are_their_values_in_fp32(base, tmp_path):
    source = tiny_clip(1, quick_gelu=True)
    torch.save(tecoa(source, precision=torch.float16), tmp_path / "half.pth.tar")
    clip, _ = import_model(str(tmp_path / "half.pth.tar"), base)
    source.model.visual.half().float()
    pixels = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(clip.encode_image(pixels), source.encode_image(pixels))
    assert {p.dtype for p in clip.parameters()} == {torch.float32}


def test_a_numpy_one_file_has_other_names_for_its_numbers(base, tmp_path):
    """numpy 1 pickled its numbers as `numpy.core…`; files of the field are that old."""
    source, file = tiny_clip(1, quick_gelu=True), tmp_path / "old.pth.tar"
    torch.save(tecoa(source), file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert b"numpy._core.multiarray" in content
    file.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert import_model(str(file), base)[1]["imported"]["part"] == "image"


def test_an_openai_model_does_not_come_back_with_gelu(base, saved_clip, tmp_path):
    """The weights fit a model with GELU as well, and would be another function."""
    torch.save(robustvlm(tiny_clip(1, quick_gelu=True)), tmp_path / "f.pt")
    with pytest.raises(UserError, match="QuickGELU"):
        import_model(str(tmp_path / "f.pt"), saved_clip)
    assert import_model(str(tmp_path / "f.pt"), base)[0].config["model_cfg"]["quick_gelu"] is True
    clip, _ = import_model(str(tmp_path / "f.pt"), saved_clip, allow_gelu=True)
    assert not clip.config["model_cfg"].get("quick_gelu")


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["top", "weights", "beside"])
@pytest.mark.parametrize(
    ("function", "legacy"), [(os.system, False), (exec, True), (Path.touch, False), (subprocess.check_call, True)]
)
def test_a_pickle_that_runs_code_is_refused_and_nothing_ran(base, tmp_path, where, legacy, function):
    trace, file = tmp_path / "trace", tmp_path / "evil.pth.tar"
    argument = {
        "system": f"touch {trace}",
        "exec": f"open({str(trace)!r}, 'w')",
        "touch": trace,
        "check_call": ["touch", str(trace)],
    }[function.__name__]
    content = tecoa(tiny_clip(1, quick_gelu=True))
    if where == "top":
        content = Runs(function, argument)
    elif where == "weights":
        content["vision_encoder_state_dict"]["proj"] = Runs(function, argument)
    else:
        content["best_acc1"] = Runs(function, argument)
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"is refused: reading it would call \S+,.*nothing was run") as refused:
        import_model(str(file), base)
    assert "\n" not in str(refused.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "an unsafe reader runs it"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("proj"), "proj is missing"),
        (lambda s: s.update({"prompt": torch.zeros(3)}), "prompt is unknown"),
        (lambda s: s.update({"proj": torch.zeros(32, 8)}), r"proj is \(32, 8\) and not \(32, 16\)"),
        (lambda s: [s.pop(k) for k in list(s)[:5]], r"(\S+ is missing; ){2}\S+ is missing, and 2 more"),
    ],
)
def test_what_does_not_fit_is_named(base, tmp_path, change, says):
    state = robustvlm(tiny_clip(1, quick_gelu=True))
    change(state)
    torch.save(state, tmp_path / "f.pt")
    with pytest.raises(UserError, match=f"--base .*{says}") as refused:
        import_model(str(tmp_path / "f.pt"), base)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": OrderedDict(), "epoch": 3}, "in no layout that is known.* it holds state_dict, epoch"),
        ([torch.zeros(2)], "it holds list"),
        ({}, "it holds nothing"),
        ({"model": {"lr": 0.1}}, "it holds model"),
    ],
)
def test_other_layouts_are_explained(base, tmp_path, content, says):
    torch.save(content, tmp_path / "f.pt")
    with pytest.raises(UserError, match=says):
        import_model(str(tmp_path / "f.pt"), base)


def test_damaged_and_missing_files_are_explained(tmp_path):
    torch.save(robustvlm(tiny_clip()), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (b"", b"no pickle", whole[:1000], whole[:-1000], b"\x80\x02]."):
        (tmp_path / "f.pt").write_bytes(content)
        with pytest.raises(UserError):
            read_weights(tmp_path / "f.pt")
    with pytest.raises(UserError):
        read_weights(tmp_path / "nothing.pt")


def test_a_model_of_the_hub_becomes_a_folder(tmp_path, monkeypatch):
    """Read from the hub's cache, in its layout; the network is off."""
    source = tiny_clip(1, quick_gelu=True)
    cached = tmp_path / "cache" / "models--lab--robust-clip"
    save_checkpoint(source, cached / "snapshots" / ("0" * 40), {})
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    clip, lineage = import_model("hf-hub:lab/robust-clip", None)
    assert clip.fingerprint() == source.fingerprint()
    assert lineage["imported"] == {"source": "hf-hub:lab/robust-clip", "fingerprint": source.fingerprint()}
    with pytest.raises(UserError):
        import_model("hf-hub:lab/robust-clip", "digits")

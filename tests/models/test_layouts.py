"""The layouts that the field saves, made here in its ways: each opens with equal weights, or says its true reason."""

import argparse
import codecs
import contextlib
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from conftest import TINY, tiny_clip
from rayclip.cli import main
from rayclip.models import load_model
from rayclip.models.checkpoint import restore, save_checkpoint
from rayclip.models.imports import import_model
from rayclip.models.loading import CONFIG_FILE, WEIGHTS_FILE
from rayclip.models.prompts import WithFrame
from rayclip.models.weights import read_weights
from rayclip.types import UserError

PIXELS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXTS = ["This is a photo of a cat", "a sea lion"]


@pytest.fixture(scope="module")
def source():
    """The fine-tuned model whose weights are saved."""
    return tiny_clip(1, quick_gelu=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What it was fine-tuned from."""
    folder = tmp_path_factory.mktemp("models") / "base"
    save_checkpoint(tiny_clip(0, quick_gelu=True), folder, {})
    return f"local-dir:{folder}"


def whole(clip):
    return dict(clip.model.state_dict())


def image(clip):
    return dict(clip.model.visual.state_dict())


def before(prefix, state):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def other(state):
    return {name: x + 1 if x.is_floating_point() else x for name, x in state.items()}


def around(state):
    """What training loops put beside weights."""
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": state,
        "args": argparse.Namespace(lr=1e-5, out=pathlib.PosixPath("runs/1"), seed=np.int64(3), train=True),
        "best": np.float32(61.5),
        "lrs": np.linspace(0, 1, 5),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": np.float64(1e-5)}]},
    }


openai = {"input_resolution": torch.tensor(8), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}

# Content, part, layout, prefix, what is left
LAYOUTS = {
    "open_clip": (
        lambda c: around(before("module.", whole(c))),
        ("whole", "state_dict", "module.", ["epoch", "name", "args", "best", "lrs", "optimizer"]),
    ),
    "lightning": (
        lambda c: {"epoch": 3, "state_dict": before("model.", whole(c)), "pytorch-lightning_version": "2.0"},
        ("whole", "state_dict", "model.", ["epoch", "pytorch-lightning_version"]),
    ),
    "lightning-with-a-loss": (
        lambda c: {"state_dict": {**before("net.clip.", whole(c)), "loss.weight": torch.ones(2)}},
        ("whole", "state_dict", "net.clip.", ["loss"]),
    ),
    "deepspeed": (lambda c: {"module": whole(c), "global_steps": 3}, ("whole", "module", "", ["global_steps"])),
    "several-wrappers": (
        lambda c: {"model": {"state_dict": whole(c)}, "epoch": 1},
        ("whole", "model.state_dict", "", ["epoch"]),
    ),
    "compiled": (lambda c: before("_orig_mod.", whole(c)), ("whole", "state dict", "_orig_mod.", [])),
    "visual": (lambda c: before("visual.", image(c)), ("image", "state dict", "visual.", [])),
    "robustvlm": (lambda c: before("vision_model.", image(c)), ("image", "state dict", "vision_model.", [])),
    "clip_model-visual": (
        lambda c: {"model": before("clip_model.visual.", image(c))},
        ("image", "model", "clip_model.visual.", []),
    ),
    "openai-state-dict": (lambda c: {**whole(c), **openai}, ("whole", "state dict", "", [])),
    "ema": (
        lambda c: {"model": whole(c), "ema": other(whole(c)), "epoch": 1},
        ("whole", "model", "", ["ema", "epoch"]),
    ),
    "ema-first": (
        lambda c: {"ema_state_dict": other(whole(c)), "weights": before("module.", whole(c))},
        ("whole", "weights", "module.", ["ema_state_dict"]),
    ),
    "ema-beside": (
        lambda c: {"state_dict": {**before("teacher.", other(whole(c))), **before("student.visual.", image(c))}},
        ("image", "state_dict", "student.visual.", ["teacher"]),
    ),
    "tecoa": (
        lambda c: {"epoch": 10, "state_dict": {"prompt": torch.randn(3, 4)}, "vision_encoder_state_dict": image(c)},
        ("image", "vision_encoder_state_dict", "", ["epoch", "state_dict"]),
    ),
    "one-element-scale": (
        lambda c: {**whole(c), "logit_scale": c.model.logit_scale.detach().view(1)},
        ("whole", "state dict", "", []),
    ),
}


def check(clip, source, part, base=None):
    """`clip` computes what `source` does; texts with the base's tower if only the image tower was imported."""
    with torch.no_grad():
        assert torch.equal(clip.encode_image(PIXELS), source.encode_image(PIXELS))
        texts = source if part == "whole" else load_model(base)
        assert torch.equal(clip.embed_texts(TEXTS), texts.embed_texts(TEXTS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_opens_with_equal_weights(layout, source, base, tmp_path):
    write, expected = LAYOUTS[layout]
    torch.save(write(source), tmp_path / "f.pt")
    clip, lineage = import_model(str(tmp_path / "f.pt"), base)
    found = lineage["imported"]
    assert (found["part"], found["layout"], found["prefix"], found["left"]) == expected
    check(clip, source, expected[0], base)


@pytest.mark.parametrize("order", itertools.permutations(["module.", "_orig_mod.", "model."]), ids="".join)
@pytest.mark.parametrize("part", ["whole", "image"])
def test_prefixes_in_any_order(order, part, source, base, tmp_path):
    prefix = "".join(order) + ("visual." if part == "image" else "")
    state = before(prefix, whole(source) if part == "whole" else image(source))
    torch.save({"state_dict": state}, tmp_path / "f.pt")
    clip, lineage = import_model(str(tmp_path / "f.pt"), base)
    assert (lineage["imported"]["part"], lineage["imported"]["prefix"]) == (part, prefix)
    check(clip, source, part, base)


@pytest.mark.parametrize("part", ["whole", "image"])
@pytest.mark.parametrize("name", ["f.safetensors", "f.pt"])
def test_safetensors_are_known_by_what_they_hold(part, name, source, base, tmp_path):
    save_file(whole(source) if part == "whole" else image(source), tmp_path / name)
    check(import_model(str(tmp_path / name), base)[0], source, part, base)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Holds(nn.Module):
    """A module that can be scripted, with another's tensors under the same names."""

    def __init__(self, other):
        super().__init__()
        self.sizes = [1, 2]
        for name, p in other.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, child in other.named_children():
            kinds = {"QuickGELU": QuickGELU, "GELU": nn.GELU}
            self.add_module(name, kinds.get(type(child).__name__, lambda child=child: Holds(child))())

    def forward(self, x):
        return x


def archive(clip, file, half=False, **buffers):
    """A TorchScript archive as `ScriptModule.save` writes it: OpenAI's files are such, in fp16."""
    holder = Holds(clip.model)
    for name, value in buffers.items():
        holder.register_buffer(name, value)
    torch.jit.script(holder.half() if half else holder).save(file)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("half", [False, True])
def test_an_archive_gives_its_weights(half, base, tmp_path):
    source = tiny_clip(1, quick_gelu=True)
    archive(source, tmp_path / "ViT.pt", half, **openai)
    assert read_weights(tmp_path / "ViT.pt").quick_gelu is True
    clip, lineage = import_model(str(tmp_path / "ViT.pt"), base)
    assert lineage["imported"]["part"] == "whole" and lineage["imported"]["keys"] == len(whole(source))
    source.model.to(torch.float16 if half else torch.float32).float()
    check(clip, source, "whole", base)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_no_code_of_an_archive_runs(base, tmp_path):
    """Of what is pickled in it only tensors are made, and its program is not even read."""
    source, trace = tiny_clip(1, quick_gelu=True), tmp_path / "trace"
    archive(source, tmp_path / "good.pt")

    def changed(target, change):
        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / target, "w") as new:
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)))
        return str(tmp_path / target)

    no_program = changed("p.pt", lambda name, data: b"raise SystemExit" if "/code/" in name else data)
    check(import_model(no_program, base)[0], source, "whole", base)
    evil = pickle.dumps({"x": _Runs(os.system, f"touch {trace}")}, protocol=2)
    with pytest.raises(UserError, match=r"reading it would call \S*system, .* nothing was run"):
        import_model(changed("evil.pt", lambda name, data: evil if name.endswith("data.pkl") else data), base)
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists(), "an unsafe reader runs it"


class _Runs:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_archive_tells_its_activation(saved_clip, base, tmp_path):
    archive(tiny_clip(1, quick_gelu=True), tmp_path / "quick.pt")
    archive(tiny_clip(1), tmp_path / "gelu.pt")
    with pytest.raises(UserError, match="is QuickGELU"):
        import_model(str(tmp_path / "quick.pt"), saved_clip, allow_gelu=True)
    with pytest.raises(UserError, match="is GELU"):
        import_model(str(tmp_path / "gelu.pt"), base)
    check(import_model(str(tmp_path / "gelu.pt"), saved_clip)[0], tiny_clip(1), "whole", saved_clip)


def write_bytes(data):
    return lambda file, clip: file.write_bytes(data)


def write_state(change):
    def write(file, clip):
        state = image(clip)
        change(state)
        torch.save(state, file)

    return write


def cut(file, clip):
    torch.save(whole(clip), file)
    file.write_bytes(file.read_bytes()[:-2000])


def cut_safetensors(file, clip):
    save_file(whole(clip), file)
    file.write_bytes(file.read_bytes()[:-2000])


def at_224(state):
    state["positional_embedding"] = torch.randn(197, 32)


CLOSED = {
    "a download gate's page": (
        write_bytes(b"<!DOCTYPE html><html><body>Google Drive can't scan this file for viruses</body></html>"),
        "is a web page and not weights",
    ),
    "a git-LFS pointer": (
        write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "is a git-LFS pointer .* git lfs pull",
    ),
    "empty": (write_bytes(b""), "is empty"),
    "cut": (cut, "is damaged: its end is missing"),
    "cut safetensors": (cut_safetensors, "is damaged: its end is missing"),
    "text": (write_bytes(b"some notes"), "is damaged, or no file of weights"),
    "a zip of something": (write_bytes(b"PK\x05\x06" + bytes(18)), "is damaged, or no file of weights"),
    "a whole model": (
        lambda file, clip: torch.save(clip.model.visual, file),
        r"is refused: reading it would call open_clip\S+, and rayclip reads weights only; nothing was run",
    ),
    "a whole model of torch's": (
        lambda file, clip: torch.save(nn.Linear(2, 2), file),
        r"is a whole pickled model and not its weights; .*save model.state_dict\(\)",
    ),
    "numpy's pickle": (
        lambda file, clip: file.write_bytes(pickle.dumps({k: v.numpy() for k, v in image(clip).items()})),
        "is a pickle that torch.save did not write",
    ),
    "nothing": (lambda file, clip: torch.save({}, file), "nothing in it has the names .* it holds nothing"),
    "an optimizer": (
        lambda file, clip: torch.save({"optimizer": {"lr": 0.1}, "epoch": 3}, file),
        "nothing in it has the names of this CLIP's weights .* it holds optimizer, epoch",
    ),
    "NaN": (
        write_state(lambda s: s["ln_post.bias"].fill_(torch.nan)),
        "its weights hold NaN or infinity, first in ln_post.bias",
    ),
    "infinity": (
        write_state(lambda s: s["conv1.weight"][0, 0, 0].fill_(-torch.inf)),
        "NaN or infinity, first in conv1.weight",
    ),
    "another input size": (
        write_state(at_224),
        r"positional_embedding is \(197, 32\) and not \(5, 32\) \(made for another image size\)",
    ),
    "another width": (
        write_state(lambda s: s.update({"proj": torch.zeros(32, 8)})),
        r"does not fit --base .*: proj is \(32, 8\) and not \(32, 16\); name the model",
    ),
    "an adapter": (write_state(lambda s: s.update({"adapter.up": torch.ones(2)})), "adapter.up is unknown"),
    "a text tower of its own": (
        lambda file, clip: torch.save(
            {**before("image_encoder.", image(clip)), "text_encoder.ln_final.weight": torch.ones(32)}, file
        ),
        "an image tower, and a text tower under names of its own",
    ),
}


@pytest.mark.parametrize("case", CLOSED)
def test_what_stays_closed_says_why(case, base, tmp_path, capsys, monkeypatch):
    """On the command line: exit code 2, one sentence, and nothing written."""
    write, reason = CLOSED[case]
    write(tmp_path / "f.pt", tiny_clip(1, quick_gelu=True))
    command = ["import", str(tmp_path / "f.pt"), "--base", base, "--out", str(tmp_path / "out")]
    said = refusal(command, capsys, monkeypatch)
    assert re.search(reason, said), said
    assert not (tmp_path / "out").exists()


def refusal(command, capsys, monkeypatch):
    """What `rayclip` says when it ends with code 2."""
    monkeypatch.setattr(sys, "argv", ["rayclip", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    return " ".join(said.split())


def test_folders_are_no_files(base, tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**small, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**small, "vocab_size": 100}, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "hf")
    for attempt in (lambda f: import_model(str(f), base), lambda f: load_model(f"local-dir:{f}")):
        with pytest.raises(UserError, match="transformers"):
            attempt(tmp_path / "hf")
    folder = base.removeprefix("local-dir:")
    with pytest.raises(UserError, match=f"local-dir:{folder}"):
        import_model(folder, base)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="folder"):
        import_model(str(tmp_path / "plain"), base)


def folder_of(clip, place, state=None, file=WEIGHTS_FILE, bom=False):
    place.mkdir()
    text = json.dumps(clip.config).encode()
    (place / CONFIG_FILE).write_bytes(codecs.BOM_UTF8 + text if bom else text)
    state = whole(clip) if state is None else state
    torch.save(state, place / file) if file.endswith(".bin") else save_file(state, place / file)
    return f"local-dir:{place}"


@pytest.mark.parametrize("kind", ["plain", "bin", "bin-module", "bom", "half", "named"])
def test_folders_that_open(kind, source, tmp_path):
    options = {
        "bin": {"file": "open_clip_pytorch_model.bin"},
        "bin-module": {
            "file": "open_clip_pytorch_model.bin",
            "state": {"state_dict": before("module.", whole(source))},
        },
        "bom": {"bom": True},
        "half": {"state": {k: v.half() if v.is_floating_point() else v for k, v in whole(source).items()}},
    }
    name = "my módel, v2 (final)" if kind == "named" else "m"
    clip = load_model(folder_of(source, tmp_path / name, **options.get(kind, {})))
    expected = tiny_clip(1, quick_gelu=True)
    if kind == "half":
        expected.model.half().float()
    check(clip, expected, "whole")
    assert clip.fingerprint() == expected.fingerprint() and clip.config["model_cfg"]["quick_gelu"] is True
    assert {p.dtype for p in clip.parameters()} == {torch.float32}


def test_folders_that_stay_closed(source, tmp_path, capsys, monkeypatch):
    state = whole(source)
    spoiled = {**state, "visual.proj": state["visual.proj"] * torch.nan}
    missing = {k: v for k, v in state.items() if k != "visual.proj"}
    cases = {
        "nan": (folder_of(source, tmp_path / "nan", spoiled), "NaN or infinity, first in visual.proj"),
        "missing": (folder_of(source, tmp_path / "missing", missing), "do not fit .*: visual.proj is missing"),
        "module": (folder_of(source, tmp_path / "image", image(source)), "holds the image tower alone"),
        "cut": (folder_of(source, tmp_path / "cut"), "is damaged: its end is missing"),
        "lfs": (folder_of(source, tmp_path / "lfs"), "is a git-LFS pointer"),
        "no config": (folder_of(source, tmp_path / "nc"), "no file open_clip_config.json"),
        "no weights": (folder_of(source, tmp_path / "nw"), "no file open_clip_model.safetensors"),
    }
    file = tmp_path / "cut" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:10000])
    (tmp_path / "lfs" / WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "nc" / CONFIG_FILE).unlink()
    (tmp_path / "nw" / WEIGHTS_FILE).unlink()
    for spec, reason in cases.values():
        with pytest.raises(UserError, match=reason) as refused:
            load_model(spec)
        assert "\n" not in str(refused.value)
    command = ["eval", "--model", cases["nan"][0], "--data", "digits", "--eps", "1/255", "--out", str(tmp_path / "o")]
    assert "NaN or infinity, first in visual.proj" in refusal(command, capsys, monkeypatch)


def test_weights_with_nan_are_refused_at_every_door(source, tmp_path):
    good = folder_of(source, tmp_path / "good")
    state = whole(source)
    state["logit_scale"] = torch.tensor(torch.inf)
    bad = folder_of(source, tmp_path / "bad", state)
    clip = load_model(good)
    for attempt in (
        lambda: load_model(bad),
        lambda: load_model(f"mix:{good}+{bad}@0.5"),
        lambda: load_model(f"mix:{bad}+{good}@1"),
        lambda: restore(clip, tmp_path / "bad"),
    ):
        with pytest.raises(UserError, match="logit_scale"):
            attempt()
    framed = WithFrame.begin(load_model(good))
    with torch.no_grad():
        framed.learned[0, 3] = torch.nan
    save_checkpoint(framed, tmp_path / "prompt", {})
    with pytest.raises(UserError, match="frame"):
        load_model(f"prompted:{tmp_path / 'prompt'}")
    with pytest.raises(UserError, match="frame"):
        restore(framed, tmp_path / "prompt")


@pytest.fixture
def architecture(tmp_path):
    """A small CLIP that open_clip knows in both activations, as it does ViT-B-32."""
    for name, more in (("tiny-arch", {}), ("tiny-arch-quickgelu", {"quick_gelu": True}), ("tiny-only", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**TINY["model_cfg"], **more}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    return "tiny-arch"


def test_a_file_of_weights_does_not_say_its_activation(architecture, source, tmp_path, capsys, monkeypatch):
    file = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": before("module.", whole(source))}, file)
    with pytest.raises(UserError, match="activation") as refused:
        load_model(f"tiny-arch:{file}")
    said = str(refused.value)
    assert f"tiny-arch-quickgelu:{file}" in said and f"tiny-arch-gelu:{file}" in said and "\n" not in said
    command = ["eval", "--model", f"tiny-arch:{file}", "--data", "digits", "--eps", "1/255", "--out", str(tmp_path)]
    assert "does not say which activation" in refusal(command, capsys, monkeypatch)
    quick, plain = load_model(f"tiny-arch-quickgelu:{file}"), load_model(f"tiny-arch-gelu:{file}")
    assert quick.config["model_cfg"].get("quick_gelu") and not plain.config["model_cfg"].get("quick_gelu")
    gelu = tiny_clip(1)
    gelu.model.load_state_dict(source.model.state_dict())
    normal = {"mean": quick.mean, "std": quick.std}
    for clip, expected in ((quick, source), (plain, gelu)):
        with torch.no_grad():
            own = expected.model.encode_image((PIXELS - normal["mean"]) / normal["std"], normalize=True)
            assert (clip.encode_image(PIXELS) - own).abs().max() < 1e-6
    again = tmp_path / "saved"
    save_checkpoint(quick, again, {})
    assert load_model(f"local-dir:{again}").fingerprint() == quick.fingerprint() != plain.fingerprint()


def test_an_architecture_with_one_activation_needs_no_word(architecture, source, tmp_path):
    torch.save(whole(source), tmp_path / "f.pt")
    assert not load_model(f"tiny-only:{tmp_path / 'f.pt'}").config["model_cfg"].get("quick_gelu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_openais_files_are_quick_gelu_by_any_name(architecture, tmp_path):
    source = tiny_clip(1, quick_gelu=True)
    archive(source, tmp_path / "jit.pt", **openai)
    torch.save({**whole(source), **openai}, tmp_path / "state.pt")
    for file in (tmp_path / "jit.pt", tmp_path / "state.pt"):
        for name in ("tiny-arch", "tiny-arch-quickgelu"):
            assert load_model(f"{name}:{file}").config["model_cfg"]["quick_gelu"] is True
        with pytest.raises(UserError, match="tiny-arch-quickgelu:"):
            load_model(f"tiny-arch-gelu:{file}")


def test_files_that_are_no_whole_model_of_that_name(architecture, source, tmp_path):
    torch.save(image(source), tmp_path / "tower.pt")
    with pytest.raises(UserError, match="rayclip import"):
        load_model(f"tiny-arch-gelu:{tmp_path / 'tower.pt'}")
    torch.save({**whole(source), "visual.positional_embedding": torch.randn(17, 32)}, tmp_path / "large.pt")
    with pytest.raises(UserError, match=r"tiny-arch: .*image size"):
        load_model(f"tiny-arch-gelu:{tmp_path / 'large.pt'}")
    (tmp_path / "page.pt").write_text("<html></html>")
    with pytest.raises(UserError, match="web page"):
        load_model(f"tiny-arch-gelu:{tmp_path / 'page.pt'}")
    with pytest.raises(UserError, match="tiny-arch-gelu:openai"):
        load_model("tiny-arch-gelu:openai")
    with pytest.raises(UserError, match="unknown"):
        load_model(f"nothing-gelu:{tmp_path / 'large.pt'}")


def test_open_clips_tags_bring_their_activation():
    """What a name with a tag loads has the activation of the tag, and each that has two has a name with -quickgelu."""
    names = set(open_clip.list_models())
    for name in names:
        for tag in open_clip.list_pretrained_tags_by_model(name):
            quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
            named_quick = bool(open_clip.get_model_config(name).get("quick_gelu"))
            if name.endswith("-quickgelu"):
                assert quick and named_quick, f"{name}:{tag} would be QuickGELU, and its weights are not"
            assert not quick or named_quick or f"{name}-quickgelu" in names
    assert not any(name.endswith("-gelu") for name in names)


def test_imports_of_the_command_line_say_what_was_taken(source, base, tmp_path, capsys, monkeypatch):
    torch.save({"model": before("module.", whole(source)), "ema": other(whole(source))}, tmp_path / "f.pt")
    command = ["rayclip", "import", str(tmp_path / "f.pt"), "--base", base, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with contextlib.suppress(SystemExit):
        main()
    assert f"the whole CLIP, {len(whole(source))} tensors of 'model' behind 'module.'; left: ema" in " ".join(
        capsys.readouterr().out.split()
    )
    check(load_model(f"local-dir:{tmp_path / 'out'}"), source, "whole", base)


@pytest.mark.ci
def test_the_real_cases(shared, tmp_path):
    """The script that lies beside the real models makes some thirty files; the six of its command open or say why."""
    script = shared / "inputs" / "import_layouts"
    shutil.copytree(script, tmp_path / "inputs" / "import_layouts")
    (tmp_path / "models").symlink_to(shared / "models")
    here = tmp_path / "inputs" / "import_layouts"
    subprocess.run([sys.executable, here / "make.py", "ck"], cwd=here, check=True, capture_output=True)
    base = f"local-dir:{here / 'ck' / 'base'}"
    for name in ("openclip_epoch.pt", "lightning.ckpt", "orig_mod.pt", "visual_only.pt"):
        clip, _ = import_model(str(here / "ck" / name), base)
        assert clip.fingerprint() != load_model(base).fingerprint()
    for name, reason in (("jit.pt", "of another architecture"), ("hfclip", "is a model of transformers")):
        with pytest.raises(UserError, match=reason):
            import_model(str(here / "ck" / name), base)

"""Checkpoints: safetensors, configurations, lineages, pickles, archives, perturbations."""

import argparse
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from conftest import tiny_clip
from fuzz import mutations as m
from fuzz.kind import Form, Kind, as_text
from rayclip.attacks.base import Samples
from rayclip.attacks.uap import UniversalPerturbation
from rayclip.models import load_model
from rayclip.models.checkpoint import model_record, read_lineage, save_checkpoint
from rayclip.models.weights import match, read_weights

# Checkpoints


class Holder(nn.Module):
    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        for name, x in whole.state_dict().items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(x, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def small_clip() -> Any:
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    return tiny_clip(embed_dim=8, vision_cfg=vision, text_cfg=text)


def make_checkpoints(folder: Path) -> None:
    clip = small_clip()
    lineage = {"rayclip": "0", "step": 1, "config": {"model": "digits", "method": {"name": "tecoa", "eps": 0.004}}}
    save_checkpoint(clip, folder / "model", {**lineage, "data": {"name": "digits", "class_names": ["a", "b"]}})
    state = clip.model.state_dict()
    beside = {"epoch": 3, "args": argparse.Namespace(lr=0.1, out=Path("x")), "best": np.float64(1), "a": np.zeros(2)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, **beside}, folder / "weights.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(Holder(clip.model)).save(folder / "program.pt")
    torch.save(torch.zeros(1, 3, 8, 8), folder / "uap.pt")
    np.save(folder / "uap.npy", np.zeros((3, 8, 8), np.float32))
    from rayclip.models.prompts import WithFrame

    base = load_model("digits")
    save_checkpoint(WithFrame.begin(base), folder / "prompt", {"rayclip": "0"})


def pickles(sound: bytes) -> m.Strategy:
    """A file of torch.save, and its pickle within: its bytes, or a program."""
    calls = [
        m.Call(os.system, f"touch {m.OUTSIDE}"),
        m.Call(open, m.OUTSIDE, "w"),
        m.Call(eval, f"open({m.OUTSIDE!r}, 'w')"),
        m.Call(getattr, m.Call(__import__, "os"), "getcwd"),
        m.Call(bytearray, 10**12),
        m.Call(torch.zeros, 10**12),
        m.Call(np.zeros, 10**12),
        m.Call(argparse.Namespace, "x"),
    ]
    made_to_harm = st.builds(
        lambda call, protocol, wrapped: pickle.dumps({"state_dict": call} if wrapped else call, protocol),
        st.sampled_from(calls),
        st.sampled_from([0, 2, 4]),
        st.booleans(),
    )
    programs = [
        b"cos\nsystem\n(S'touch ../secret'\ntR.",
        b"\x80\x02" + b"(" * 100_000,
        b"\x80\x02]" + b"]a" * 100_000 + b".",
    ]
    programs += [
        b"\x80\x02X\xff\xff\xff\x7f",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x80\x02]q\x00h\x00a.",
        b"(lp0\ng0\na.",
    ]
    programs += [b"\x80\x02(" + b"Y" * 9, b"I" + b"9" * 10_000 + b"\n.", b"\x80\x02\x8b\xff\xff\xff\x7f", b"\x80\x63."]
    odd = [x.expand(10**12) if not i else x for i, x in enumerate([torch.zeros(1), torch.zeros(2, device="meta")])]
    odd += [torch.zeros(3).to_sparse(), torch.quantize_per_tensor(torch.zeros(3), 1, 0, torch.qint8), torch.zeros(0)]
    odd += [torch.zeros(1).expand(3, 10**6, 10**6), torch.tensor(float("nan")), torch.zeros(1, dtype=torch.complex64)]
    name = "positional_embedding"
    saved = [x if bare else {"state_dict": {name: x, "visual.proj": x}} for x in odd for bare in (True, False)]
    programs += [torch_bytes(value, new) for value in saved for new in (True, False)]
    options: list[m.Strategy] = [m.any_file(sound), m.any_file(sound), made_to_harm, st.sampled_from(programs)]
    if sound.startswith(b"PK"):
        options += [zipped(sound, made_to_harm, st.sampled_from(programs))] * 2
    return st.one_of(options)


def torch_bytes(value: Any, new: bool) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer, _use_new_zipfile_serialization=new)
    except (RuntimeError, NotImplementedError):
        return b""
    return buffer.getvalue()


def zipped(sound: bytes, *inside: m.Strategy) -> m.Strategy:
    """The same archive with another pickle in it, other records, or a record that unpacks to a bomb."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))

    def write(changed: Mapping[str, bytes], packed: int) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", packed) as archive:
            for name, data in {**records, **changed}.items():
                archive.writestr(name, data)
        return buffer.getvalue()

    @st.composite
    def draw_archive(draw: Any) -> bytes:
        act = draw(st.sampled_from(["pickle", "pickle", "program", "record", "name", "bomb"]))
        packed = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        if act == "pickle":
            return write({pickled: draw(m.bytes_of(records[pickled]))}, packed)
        if act == "program":
            return write({pickled: draw(st.one_of(*inside))}, packed)
        name = draw(st.sampled_from(sorted(records)))
        if act == "record":
            return write({name: draw(m.bytes_of(records[name]))}, packed)
        if act == "name":
            return write(
                {draw(st.sampled_from(["/etc/x", f"{m.OUTSIDE}/x", "x/constants.pkl", "x"])): b"x"},
                packed,
            )
        return write({name: bytes(3 << 29 if draw(st.integers(0, 40)) == 0 else 1 << 20)}, zipfile.ZIP_DEFLATED)

    return draw_archive()


def read_model(folder: Path) -> Any:
    spec = f"local-dir:{folder / 'model'}"
    clip = load_model(spec)
    as_text(model_record(spec))
    return [p.sum().isfinite().item() for p in clip.parameters()]


def read_prompt(folder: Path) -> Any:
    spec = f"prompted:{folder / 'prompt'}"
    load_model(spec)
    as_text(model_record(spec))


def read_pickle(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = read_weights(folder / name)
        as_text([found.entries, {k: list(v) for k, v in found.groups.items()}])
        if name != "program.pt":
            fitting = match(found, small_clip().model)
            as_text([fitting.layout, fitting.prefix, list(fitting.weights), fitting.left])

    return read


def read_perturbation(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        images = torch.zeros(2, 3, 8, 8)
        attack = UniversalPerturbation(file=str(folder / name)).pinned()
        found = attack.craft(None, Samples(images, torch.zeros(2).long(), (0, 1)), eps=8 / 255)  # type: ignore[arg-type]
        assert found.images_BCHW.min() >= 0 and found.images_BCHW.max() <= 8 / 255 + 1e-6

    return read


def read_origin(folder: Path) -> Any:
    as_text(read_lineage(folder / "model"))
    as_text(model_record(f"local-dir:{folder / 'model'}"))


CHECKPOINTS = Kind(
    make=make_checkpoints,
    forms=(
        *[Form(file="model/open_clip_model.safetensors", damage=m.safetensors, read=read_model)] * 3,
        *[Form(file="model/open_clip_config.json", damage=m.json_file, read=read_model)] * 2,
        Form(file="model/rayclip.json", damage=m.json_file, read=read_origin),
        Form(file="prompt/rayclip.json", damage=m.json_file, read=read_prompt),
        Form(file="prompt/prompt.safetensors", damage=m.safetensors, read=read_prompt),
        *[Form(file="weights.pt", damage=pickles, read=read_pickle("weights.pt"))] * 2,
        Form(file="old.pt", damage=pickles, read=read_pickle("old.pt")),
        Form(file="program.pt", damage=pickles, read=read_pickle("program.pt")),
        Form(file="uap.pt", damage=pickles, read=read_perturbation("uap.pt")),
        Form(file="uap.npy", damage=m.any_file, read=read_perturbation("uap.npy")),
    ),
)

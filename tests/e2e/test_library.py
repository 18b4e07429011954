"""The library's example as it is documented."""

import re
from pathlib import Path

import pytest
import torch

import rayclip
from conftest import tiny_clip

pytestmark = pytest.mark.e2e


def test_the_example(tmp_path, monkeypatch):
    """With small models and few images, and otherwise as it is printed."""
    monkeypatch.chdir(tmp_path)
    text = (Path(rayclip.__file__).parent / "api" / "README.md").read_text()
    (code,) = (
        block for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "rayclip.wrap" in block
    )
    for old, new in {
        "ViT-B-32:openai": "digits",
        '"cifar10"': '"digits"',
        'eps="1/255")': 'eps="1/255", limit=8, quiet=True)',
        'out="tecoa"': 'out="tecoa", shots=1, epochs=1, quiet=True',
        "steps=100": "steps=4",
        "autoattack": "fgsm",
    }.items():
        assert old in code
        code = code.replace(old, new)
    own = tiny_clip()
    space = {
        "my_module": own.model,
        "preprocess": ((0.5,) * 3, (0.25,) * 3, 8),
        "tokenizer": lambda texts: own.token_rows(texts),
        "images": torch.rand(4, 3, 8, 8),
        "labels": torch.tensor([0, 1, 0, 1]),
    }
    exec(code, space)
    assert space["found"].images.shape == (4, 3, 8, 8) and len(space["rows"]) == 4
    assert rayclip.load("local-dir:tecoa").clip.fingerprint() != rayclip.load("digits").clip.fingerprint()

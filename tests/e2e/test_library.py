"""The README's example of the library, its training included."""

import pytest

import rayclip
from calling import run_example
from test_documented_commands import ROOT, python_of

pytestmark = pytest.mark.e2e


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_example(python_of(ROOT / "README.md"))
    trained, untouched = (rayclip.load(name).clip.fingerprint() for name in ("local-dir:tecoa", "digits"))
    assert trained != untouched

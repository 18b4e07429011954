"""Data sets that a package of somebody else's offers do all that ours do."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from calling import call
from rayclip.data import open_data
from rayclip.data.registry import DATASETS
from rayclip.types import UserError

README = Path(__file__).parents[2] / "rayclip/data/README.md"
SOURCE = """
import io
from PIL import Image
from rayclip.data import DatasetInfo
from rayclip.data.sources import Record, Source


class Drawn(Source):
    class_names = ("dark_square", "light_square")

    def describe(self):
        return {"kind": "drawn", "version": 1}

    def splits(self):
        return {"train": 6, "test": 4}

    def records(self, split, start=0):
        for i in range(start, self.splits()[split]):
            yield Record(path=f"{split}/{i}", read=lambda i=i: self.png(i), label=i % 2)

    def png(self, i):
        if i == 3:
            raise OSError("lost")
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (200 * (i % 2), i, 0)).save(buffer, "png")
        return buffer.getvalue()


drawn = DatasetInfo(
    name="drawn", title="Drawn", splits={"train": 6, "test": 4}, source=lambda splits: Drawn(), evaluated="test",
    classes=2, resize="square", licence="CC0.", citation="Nobody 2026, Drawn",
)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Somebody's package, as pip leaves it, with the data set that the README tells how to add."""
    about = tmp_path / "site/theirs-1.0.dist-info"
    about.mkdir(parents=True)
    (code,) = re.findall(r"```\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "site/theirs.py").write_text(code + SOURCE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rayclip.datasets]\nsquares = theirs:squares\ndrawn = theirs:drawn\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "root"))
    yield about
    sys.modules.pop("theirs", None)


@pytest.fixture
def rayclip(monkeypatch, capsys):
    def run(*args):
        code, out, err = call(monkeypatch, capsys, *args)
        assert code in (0, None), err
        return out

    return run


def test_one_that_needs_no_preparing(installed, rayclip):
    assert "squares" in rayclip("data", "list") and "20 / 10" not in rayclip("data", "show", "drawn")
    shown = rayclip("data", "show", "squares")
    assert "Squares" in shown and "bundled" in shown and "dark 5/5" in shown
    data = open_data("squares", "test")
    assert len(data) == 10 and data.images([1])[0].getpixel((0, 0)) == (200, 200, 200)
    assert len(open_data("squares#validation", "test")) == 2 and len(open_data("squares#holdout", "train")) == 8
    with pytest.raises(UserError, match="has no split 'val'"):
        open_data("squares", "val")
    with pytest.raises(UserError, match=r"'circles'.*cifar10.*squares"):
        open_data("circles", "test")


def test_one_with_a_source_of_its_own(installed, rayclip):
    listed = {d["name"]: d for d in json.loads(rayclip("data", "list", "--json"))["data_sets"]}
    assert listed["drawn"]["default"] == "package" and listed["drawn"]["prepared"] == {}
    with pytest.raises(UserError, match="rayclip data prepare drawn"):
        open_data("drawn", "test")
    assert "set aside: 1" in rayclip("data", "prepare", "drawn", "--quiet")
    assert "already prepared" in rayclip("data", "prepare", "drawn", "--quiet")
    assert "as its manifest says" in rayclip("data", "verify", "drawn", "--quiet")
    assert "dark square 3/2" in rayclip("data", "show", "drawn")
    data = open_data("drawn", "test")
    assert np.array_equal(data.labels, [0, 1, 0]) and data.class_names == ("dark square", "light square")
    assert data.resize == "square" and "1 of the 4 test images" in data.notes[0]


def test_a_name_that_is_taken_is_refused(installed):
    (installed / "entry_points.txt").write_text("[rayclip.datasets]\ncifar10 = theirs:squares\n")
    with pytest.raises(UserError, match="two packages offer a data set named 'cifar10'"):
        list(DATASETS)

"""An evaluation asked for in the same words is answered from disk, as long as nothing behind the words has changed."""

import errno
import os

import pytest

from rayclip.cli import answers
from rayclip.cli.answers import Answer
from rayclip.store import Store
from rayclip.tracking.journal import Journal
from rayclip.types import Row

WORDS = {"models": ["digits"], "data": ["digits"], "tracking": ["http://host", "study"]}


@pytest.fixture
def kept(tmp_path):
    """Results, a file that the words name, and the answer that is kept for them."""
    store, file = Store(str(tmp_path / "out")), tmp_path / "model" / "weights.bin"
    file.parent.mkdir()
    file.write_bytes(b"old")
    store.write("cells/c/0.parquet", b"")
    row = Row(
        model="digits",
        dataset="digits",
        attack="clean",
        eps=None,
        steps=None,
        n=4,
        top1=75.0,
        ci_low=30.1,
        ci_high=95.4,
        protocol={"template": "a {}", "parts": ["a", "b"]},
        cell="c",
    )
    answer = Answer([row], [("warning", "mind the gap")])
    places = ["digits", f"local-dir:{file.parent}"]
    answers.keep(WORDS, places, store.root, answer)
    return store, file, places, answer


def test_the_same_words_find_the_answer(kept):
    store, _, places, answer = kept
    assert answers.find(WORDS, places, store.root) == answer
    assert answers.find({**WORDS, "data": ["cifar10"]}, places, store.root) is None


def rewrite(store, file):
    file.write_bytes(b"new")
    os.utime(file, ns=(1, 1))


def add(store, file):
    (file.parent / "more").touch()


def lose(store, file):
    store.delete("cells/c/0.parquet")


def wait(store, file):
    Journal(store).metrics("run", [("x", 1.0, 0)])


@pytest.mark.parametrize("change", [rewrite, add, lose, wait])
def test_whatever_has_changed_is_looked_at_anew(kept, change):
    store, file, places, _ = kept
    change(store, file)
    assert answers.find(WORDS, places, store.root) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 1}', b"\xff"])
def test_a_damaged_answer_is_none(kept, content):
    store, _, places, _ = kept
    for name in store.names("answers", ".json"):
        store.write(name, content)
    assert answers.find(WORDS, places, store.root) is None


def test_an_answer_that_cannot_be_kept_costs_nothing(kept, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, _, places, answer = kept
    monkeypatch.setattr(Store, "write_json", full)
    answers.keep({**WORDS, "models": ["other"]}, places, store.root, answer)


@pytest.mark.parametrize("place", ["s3://bucket/model", "hf-hub:org/name", "prompted:p", "mix:digits+digits@0.5"])
def test_what_somebody_else_may_change_is_never_answered_from_disk(tmp_path, place):
    answers.keep(WORDS, [place], str(tmp_path), Answer([], []))
    assert list(tmp_path.rglob("*.json")) == []

"""The plan and the folder of a captioning run; the run itself is in e2e/test_captions.py."""

import dataclasses

import pytest

from rayclip.data import open_data
from rayclip.distributed.captioning import CaptionJob, example_positions, open_parts
from rayclip.models.generators import GeneratorSettings
from rayclip.types import UserError

JOB = CaptionJob(
    generator="x",
    generator_fingerprint="f",
    class_names=tuple(f"class {i}" for i in range(10)),
    per_class=20,
    questions=("what is {}?",),
    settings=GeneratorSettings(batch_size=64),
)


def test_chunks_fill_a_batch():
    assert [len(chunk) for chunk in JOB.chunks()] == [3, 3, 3, 1]
    assert sum(JOB.chunks(), ()) == JOB.class_names
    assert len(dataclasses.replace(JOB, per_class=100).chunks()) == 10


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"per_class": 2}, {"generator_fingerprint": "g"}, {"settings": GeneratorSettings(temperature=0.5)}],
)
def test_a_folder_belongs_to_one_job(tmp_path, change):
    open_parts(JOB, tmp_path / "c.parts")
    open_parts(JOB, tmp_path / "c.parts")
    with pytest.raises(UserError, match=f"was begun with another {next(iter(change))}: "):
        open_parts(dataclasses.replace(JOB, **change), tmp_path / "c.parts")


def test_examples_are_of_the_class_and_the_same_each_time():
    data = open_data("digits", "train")
    seven = example_positions(data, "seven", 3, seed=0)
    assert len(set(seven)) == 3 and set(data.labels[seven]) == {7}
    assert example_positions(data, "seven", 2, seed=0) == seven[:2]
    assert example_positions(data, "seven", 3, seed=1) != seven
    assert len(example_positions(data, "seven", 10_000, seed=0)) == (data.labels == 7).sum()

"""What a training run reads, and in which order."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from data.test_data import png, write
from rayclip.data import few_shot, open_data
from rayclip.data.prepare import Request, prepare
from rayclip.data.sampling import EpochSampler, draw_record, webdataset_draw
from rayclip.data.shardwriter import Layout
from rayclip.data.sources.parquet_files import open_parquet
from rayclip.store import Store


def test_an_epoch_uses_every_image_once_in_batches_of_nearly_one_size():
    sampler = EpochSampler(count=1352, batch_size=128, seed=0)
    batches = sampler.global_batches(0)
    assert len(batches) == sampler.steps_per_epoch
    assert sorted(i for b in batches for i in b) == list(range(1352))
    assert {len(b) for b in batches} == {122, 123}
    assert sampler.global_batches(1)[0].tolist() != batches[0].tolist()


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 64),
    epoch=st.integers(0, 5),
    worlds=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    stops=st.lists(st.integers(0, 40), max_size=3),
)
def test_whoever_goes_on_from_any_step_nothing_is_read_twice_or_left_out(count, batch_size, epoch, worlds, stops):
    """Each part of an epoch is read by another number of ranks, as after a lost node."""
    steps = EpochSampler(count=count, batch_size=batch_size, seed=3).steps_per_epoch
    ends = sorted({min(s, steps) for s in stops} | {steps})
    read, done = [], 0
    for i, end in enumerate(ends):
        world = worlds[i % len(worlds)]
        ranks = [
            EpochSampler(count=count, batch_size=batch_size, seed=3, rank=r, world_size=world) for r in range(world)
        ]
        for batch in ranks[0].global_batches(epoch, done)[: end - done]:
            shares = [rank.share(batch) for rank in ranks]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            read += [p for share in shares for p in share.tolist()]
        done = end
    assert sorted(read) == list(range(count))


@pytest.fixture
def prepared(tmp_path):
    """60 images of 3 classes in several shards; the grey value of an image is its row."""
    images = [png((i, i, i), (16, 16)) for i in range(60)]
    file = write(tmp_path / "train.parquet", [i % 3 for i in range(60)], images)
    source = open_parquet(tmp_path / "train.parquet", "own")
    request = Request(
        name="own",
        class_names=source.class_names,
        splits=("train",),
        layout=Layout(shard=len(images[0]) * 7, group=200),
    )
    manifest = prepare(request, source, Store(str(tmp_path)))
    assert len(manifest.splits["train"].shards) == 9 and file
    return str(tmp_path / "own")


class Greys(Dataset):
    def __init__(self, data):
        self.data = data

    def __getitem__(self, positions):
        return [image.getpixel((0, 0))[0] for image in self.data.images(positions.tolist())]


@pytest.mark.ci
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_read_any_image_of_any_shard(prepared, context):
    data = open_data(prepared, "train")
    data.images([0])  # what the parent has opened is not shared with its children
    batches = EpochSampler(count=60, batch_size=7, seed=0).global_batches(0)
    loader = DataLoader(Greys(data), sampler=batches, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert list(loader) == [batch.tolist() for batch in batches]


def test_an_opened_data_set_travels_to_other_processes(prepared):
    data = open_data(prepared, "train")
    data.images([5])
    twin = pickle.loads(pickle.dumps(data))
    assert twin.images([59])[0].getpixel((0, 0)) == (59, 59, 59) and twin.fingerprint == data.fingerprint


def test_a_draw_is_recorded_by_class(prepared):
    data = open_data(prepared, "train")
    record = draw_record(few_shot(data, 4, 7), 4, 7)
    assert [len(c["ids"]) for c in record["ids"]] == [4, 4, 4] and record["seed"] == 7
    for label, of_class in enumerate(record["ids"]):
        assert all(data.labels[np.flatnonzero(data.ids == i)[0]] == label for i in of_class["ids"])
    assert record == draw_record(few_shot(open_data(prepared, "train"), 4, 7), 4, 7)


@pytest.mark.parametrize(
    ("archives", "total", "first"),
    [
        ((10_300,), 5_042_768, {6311, 6890, 663, 4242, 8376}),
        ((3_000,), 1_493_818, {1577, 1722, 165, 1060, 2094}),
        ((700, 650), 685_938, {394, 430, 41, 265, 523}),
        ((90, 400, 350, 60, 500, 30), 693_491, {1204, 1240, 41, 1075, 1333}),
    ],
)
def test_the_draw_from_a_webdataset_is_that_of_robustvlms_code(archives, total, first):
    """Of the thousand that webdataset 0.2.48 and torch's DataLoader gave with its settings: sum, first five."""
    drawn = webdataset_draw(archives, 1_000)
    assert len(set(drawn.tolist())) == 1_000 and (np.diff(drawn) > 0).all()
    assert drawn.sum() == total and first <= set(drawn.tolist())
    assert len(webdataset_draw((30, 20), 1_000)) == 50

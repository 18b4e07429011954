"""How a pool shrinks when Ray's memory monitor ends its workers, and grows again."""

import math

from rayclip.distributed.pool import MemoryPressure


def test_nothing_stands_against_any_number_at_first():
    assert MemoryPressure(64).most(0.0) == math.inf


def test_a_worker_that_had_others_beside_it_is_missing_for_a_while():
    pressure = MemoryPressure(64)
    assert pressure.lost(3, now=10.0) and pressure.lost(2, now=11.0)
    assert pressure.most(12.0) == 2 and pressure.batch_size == 64, "the others have batches as before"
    assert pressure.most(200.0) == 3, "all is calm"
    assert pressure.lost(2, now=201.0)
    assert pressure.most(300.0) == 2, "the calm has to last longer each time"


def test_a_worker_that_was_alone_rests_and_takes_half_the_batch():
    pressure = MemoryPressure(64)
    assert pressure.lost(0, now=0.0)
    assert pressure.most(0.5) == 0 and pressure.most(1.5) == 1 and pressure.batch_size == 32


def test_it_ends_when_nothing_can_be_made_smaller():
    pressure, now = MemoryPressure(64), 0.0
    while pressure.lost(0, now):
        now += 10.0
    assert pressure.batch_size == 1 and pressure.killed == 7, "64, 32, 16, 8, 4, 2, 1"


def test_small_batches_get_some_patience_too_and_a_finished_shard_renews_it():
    pressure = MemoryPressure(1)
    for _ in range(3):
        assert all(pressure.lost(0, 0.0) for _ in range(4))
        pressure.done()
    assert all(pressure.lost(0, 0.0) for _ in range(4)) and not pressure.lost(0, 0.0)

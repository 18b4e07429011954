"""Who runs what: the schedule alone, and its loop against simulated workers."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scheduling import BOUND, DRIVER_BYTES, OVERHEAD, Workers, make_queues, measure, simulate
from rayclip.evaluation import forecast
from rayclip.evaluation.plan import cut_cells
from rayclip.evaluation.schedule import Queue, Schedule, ShardId


def queue(samples, seconds=1.0, needs=("m", "d"), size=10):
    return Queue(samples=samples, size=size, needs=needs, seconds=seconds)


QUEUES = st.lists(
    st.builds(
        queue,
        st.integers(1, 40),
        st.sampled_from([0.5, 1.0, 3.0, 20.0]),
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=6,
)


@given(QUEUES, st.data())
def test_every_sample_is_done_exactly_once_whatever_happens(queues, data):
    schedule, names, now = Schedule(queues), itertools.count(), 0.0
    runs, done, losses = {}, Counter(), Counter()
    free = {next(names)}
    schedule.join(*free)
    trouble = 60
    while not schedule.done:
        for worker in sorted(free):
            shard = schedule.start(worker, now)
            assert shard is not None or not schedule.queued, "nobody is idle while something waits"
            if shard is not None:
                free.remove(worker)
                runs[worker] = shard
        twice = Counter(runs.values())
        assert max(twice.values(), default=0) <= 2
        now += data.draw(st.sampled_from([0.1, 5.0, 400.0]))
        busy = sorted(runs)
        what = data.draw(st.sampled_from(["finish", "fail", "leave", "join", "reprice"] if trouble else ["finish"]))
        trouble = max(0, trouble - 1)
        if what == "join" or not runs:
            free.add(next_name := next(names))
            schedule.join(next_name)
        elif what == "reprice":
            schedule.reprice([data.draw(st.sampled_from([0.1, 1.0, 9.0])) for _ in queues])
        else:
            worker = data.draw(st.sampled_from(busy))
            shard = runs.pop(worker)
            if what == "finish":
                assert schedule.finish(worker) == (shard if not done[shard] else None)
                done[shard] += not done[shard]
                free.add(worker)
            else:
                loss = schedule.fail(worker) if what == "fail" else schedule.leave(worker)
                free |= {worker} if what == "fail" else set()
                if done[shard] or shard in runs.values():
                    assert loss is None, "another copy of it runs or has ended"
                else:
                    losses[shard] += 1
                    assert loss == (shard, losses[shard])
    assert done == Counter({ShardId(c, n): 1 for c, q in enumerate(queues) for n in range(len(q))})
    assert sum(queues[s.cell].samples_of(s.number) for s in done) == sum(q.samples for q in queues)


def lengths_in_order(queues, workers=1):
    schedule, found = Schedule(queues), []
    for worker in range(workers):
        schedule.join(worker)
    workers = itertools.cycle(range(workers))
    while (shard := schedule.start(worker := next(workers), 0.0)) is not None:
        found.append((shard.cell, queues[shard.cell].seconds * queues[shard.cell].samples_of(shard.number)))
        schedule.finish(worker)
    return found


@given(st.lists(st.builds(queue, st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=8))
def test_longest_first(queues):
    found = [length for _, length in lengths_in_order(queues)]
    assert len(found) == sum(map(len, queues))
    for number, q in enumerate(queues):  # a cell's last, shorter shard comes when it is the longest
        assert sum(cell == number for cell, _ in lengths_in_order(queues)) == len(q)
    assert found == sorted(found, reverse=True)


def test_what_is_loaded_is_preferred_until_the_end_is_near():
    many = [queue(1000, 1.0, ("a", "x")), queue(1000, 1.1, ("b", "x")), queue(1000, 0.9, ("a", "y"))]
    order = [cell for cell, _ in lengths_in_order(many)]
    changes = [before for before, after in itertools.pairwise(order) if before != after]
    assert changes == [1, 0], "each model is loaded once, and a model's class sets one after the other"
    # The long shard is half of what is left: it must not wait for the short ones that are warm
    schedule = Schedule([queue(40, 1.0, ("a", "x")), queue(10, 1.5, ("b", "x"))])
    schedule.join(0)
    schedule.join(1)
    assert schedule.start(0, 0.0) == ShardId(1, 0)
    assert schedule.start(1, 0.0).cell == 0
    schedule = Schedule([queue(30, 2.0, ("a", "x")), queue(10, 1.9, ("b", "x"))])
    schedule.join(0)
    assert [schedule.start(0, 0.0).cell, schedule.finish(0).cell, schedule.start(0, 0.0).cell] == [0, 0, 0]
    schedule.finish(0)
    schedule.reprice([2.0, 9.0])
    assert schedule.start(0, 0.0).cell == 1, "better knowledge changes the order"


def test_a_late_shard_gets_one_copy_and_counts_once():
    schedule = Schedule([queue(20)])
    for worker in range(4):
        schedule.join(worker)
    first, second = schedule.start(0, 0.0), schedule.start(1, 0.0)
    assert schedule.start(2, 14.0) is None, "not late yet"
    assert schedule.finish(1) == second
    assert schedule.start(2, 16.0) == first and schedule.copies == 1
    assert schedule.start(3, 99.0) is None, "two are enough"
    assert schedule.finish(2) == first and schedule.done
    assert schedule.finish(0) is None
    assert schedule.lost == 0


@pytest.mark.ci
def test_simulated_workers_reach_the_bound_and_cost_the_driver_little():
    """The benchmark's limits, at a size that takes seconds."""
    for shards, count in [(10_000, 500), (10_000, 2000)]:
        rng = np.random.default_rng(count)
        tracemalloc.start()
        queues = make_queues(shards, rng, workers=count)
        Schedule(queues)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert memory < DRIVER_BYTES * shards
        found = measure(queues, count, rng)
        assert found.outcome.losses > 0
        assert all(set(ends) == {1} for ends in found.outcome.ends)
        assert 1 <= found.over_bound < BOUND
        assert found.overhead < OVERHEAD


def test_lost_workers_without_replacement_and_silence():
    queues = [queue(100, 1.0, ("a", "x"))]
    alone = simulate(queues, Workers(count=2))
    assert alone.makespan == pytest.approx(50) == forecast.simulate(queues, 2, lambda model: 0.0)
    assert alone.work == pytest.approx(100) and alone.losses == 0
    less = simulate(queues, Workers(count=2, vanish={1: 15.0}, notice=3.0))
    assert less.losses == 1 and less.makespan == pytest.approx(90)
    more = simulate(queues, Workers(count=2, vanish={1: 15.0}, notice=3.0, replace=2.0, load=lambda model: 1.0))
    assert more.makespan == pytest.approx(61) and more.loading == pytest.approx(3)
    # Long after its time, a worker that only is slow has its shard taken over
    slow = simulate(
        queues, Workers(count=2), lambda shard, worker: 1000.0 if (worker, shard.number) == (0, 0) else 10.0
    )
    assert slow.copies == 1 and slow.makespan < 110


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0.001, 50), st.integers(1, 512)), min_size=1, max_size=9),
    st.integers(2, 64),
)
def test_shards_are_cut_to_parts_of_a_share_and_smaller_towards_the_end(cells, workers):
    samples, seconds, sizes = zip(*cells, strict=True)
    share = sum(n * s for n, s in zip(samples, seconds, strict=True)) / workers
    pieces = cut_cells(samples, seconds, sizes, workers, smallest=16)
    for n, s, before, parts in zip(samples, seconds, sizes, pieces, strict=True):
        assert sum(count for count, _ in parts) == n and 1 <= len(parts) <= 2
        assert all(1 <= size <= before for _, size in parts)
        assert all(size <= 16 or size * s <= share / 4 for _, size in parts)
        assert all(size == before or (size + 1) * s > share / 48 or size >= min(16, before) for _, size in parts)
        if len(parts) == 2:
            (large, long), (small, short) = parts
            assert short < long and small <= large
    assert cut_cells(samples, seconds, sizes, 1, smallest=16) == [[pair] for pair in zip(samples, sizes, strict=True)]

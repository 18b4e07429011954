"""What is planned, and what it took: from results of a real evaluator, without Ray."""

from dataclasses import replace

import pytest

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, make_cells, outstanding
from rayclip.evaluation.costs import Costs, Decoding, Hardware, read_timings
from rayclip.evaluation.forecast import (
    common_hardware,
    compare_with_plan,
    forecast,
    keep_plan,
    read_plan,
    read_recorded,
)
from rayclip.evaluation.reading import Reading
from rayclip.models import load_model
from rayclip.types import UserError

POSITIONS = {"digits": chosen_positions(445, 120)}
GPUS = Hardware(name="GPU", gpus=0.5, cores=1)


@pytest.fixture(scope="module")
def cells():
    return make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks("clean,pgd", {"steps": 2, "step": 16 / 255}),
        Protocol(eps=32 / 255),
    )


def plan(cells, store, *, seconds=(1.0, 10.0), **options):
    costs = Costs()
    for cell, each in zip(cells, seconds, strict=True):
        costs.add(cell, 1, each)
    work = outstanding(cells, POSITIONS, store, 12)
    return forecast(
        work,
        costs,
        options.pop("hardware", GPUS),
        finished=len(cells) - len(work),
        smallest=12,
        store=store,
        **options,
    )


def test_hours_wall_times_and_prices(cells, tmp_path):
    fingerprint = cells[0].model_fingerprint
    found = plan(cells, Store(str(tmp_path)), workers=[1, 4, 1000], loading={fingerprint: 30.0}, start=7.0, price=3.0)
    assert (len(found.cells), found.finished, found.samples, found.shards) == (2, 0, 240, 20)
    assert found.seconds == pytest.approx(120 * 11) and found.hours == pytest.approx(120 * 11 / 2 / 3600)
    one, four, many = found.workers
    assert one.wall == pytest.approx(7 + 30 + 120 * 11)
    assert 7 + 30 + 120 * 11 / 4 <= four.wall < 1.2 * (7 + 30 + 120 * 11 / 4)
    assert many.wall == pytest.approx(7 + 30 + 12 * 10), "no shorter than one shard"
    assert four.hours == pytest.approx(4 * 0.5 * four.wall / 3600) and four.cost == pytest.approx(3 * four.hours)
    assert {cell.basis for cell in found.cells.values()} == {"measured"}
    assert plan(cells, Store(str(tmp_path)), workers=[2]).workers[0].cost is None


def test_planned_and_actual_side_by_side(cells, tmp_path):
    store = Store(str(tmp_path))
    evaluator = Evaluator(store)
    clean, attacked = (list(shards) for shards in outstanding(cells, POSITIONS, store, 30))
    for shard in clean[:1]:
        evaluator.run(shard)
    keep_plan(plan(cells, store, workers=[2]), store)
    kept = read_plan(store)
    assert kept.hardware == GPUS and kept.cells[cells[0].id].samples == 90
    assert [(each.done, each.actual) for each in compare_with_plan(kept, store)] == [(0, 0.0), (0, 0.0)], (
        "the rest is older"
    )
    evaluator.run(clean[1])
    assert compare_with_plan(kept, store)[0].done == 30
    for shard in [*clean[2:], *attacked[:2]]:
        evaluator.run(shard)
    keep_plan(plan(cells, store, workers=[2], seconds=(5.0, 50.0)), store)
    first, second = compare_with_plan(read_plan(store), store)
    assert (first.attack, first.planned, first.samples, first.done) == ("clean", 90.0, 90, 90)
    assert (second.attack, second.planned, second.samples, second.done) == ("pgd-2_eps32", 1200.0, 120, 60)
    took = read_recorded(cells[0].id, store)[1] - kept.cells[cells[0].id].before[1]
    assert first.actual == pytest.approx(took) and 0 < second.actual == read_recorded(cells[1].id, store)[1]
    for shard in attacked[2:]:
        evaluator.run(shard)
    empty = plan(cells, store, workers=[2])
    assert (len(empty.cells), empty.finished, empty.workers[0].wall) == (0, 2, 0.0)
    keep_plan(empty, store)
    assert [each.done for each in compare_with_plan(read_plan(store), store)] == [90, 120]
    assert common_hardware(cells, store) == evaluator.hardware


def test_a_plan_says_which_cells_wait_for_their_images(cells, tmp_path):
    """Of 10 images the first cell takes 1 s besides waiting, for which one thread has to decode for 8 s."""
    store, costs = Store(str(tmp_path)), Costs()
    costs.add(cells[0], 10, 3.0, Reading(decoding=8.0, waiting=2.0, threads=4))
    costs.add(cells[1], 10, 8.0, Reading(decoding=8.0, waiting=0.0, threads=4))
    work = outstanding(cells, POSITIONS, store, 12)
    found = forecast(work, costs, GPUS, workers=[1], finished=0, smallest=12)
    slow, fast = (found.cells[cell.id].decoding for cell in cells)
    assert slow == Decoding(rate=1.25, threads=4, needed=8.0) and fast.needed == 1.0
    assert [cell.attack for cell in found.bound_by_decoding] == ["clean"]
    keep_plan(found, store)
    assert read_plan(store).bound_by_decoding == found.bound_by_decoding


def test_what_was_read_is_in_the_results(cells, tmp_path):
    store = Store(str(tmp_path))
    (shard,) = outstanding(cells[:1], POSITIONS, store, 120)[0]
    done = Evaluator(store, threads=2).run(shard)
    (timing,) = read_timings(cells[0].id, store)
    assert timing.reading == done.reading and timing.reading.decoding > 0 and timing.reading.threads == 2


def test_a_damaged_plan_is_named(cells, tmp_path):
    store = Store(str(tmp_path))
    assert read_plan(store) is None
    store.write_json("plan.json", {"hardware": {}})
    with pytest.raises(UserError, match=r"plan\.json"):
        read_plan(store)


def test_other_shard_sizes_cost_the_same(cells, tmp_path):
    a, b = (plan([replace(c) for c in cells], Store(str(tmp_path)), workers=[n]) for n in (1, 64))
    assert a.seconds == b.seconds and b.workers[0].wall < a.workers[0].wall / 8

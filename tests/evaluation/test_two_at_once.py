"""Commands that evaluate in one folder at the same time compute each verdict once, and end with the same results."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from rayclip.api import Evaluation, Where, evaluate_models
from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.data.leases import Leases
from rayclip.distributed.evaluating import _EvaluationPool
from rayclip.distributed.resources import PoolSize, Share
from rayclip.evaluation import Protocol, Store, chosen_positions, make_cells, outstanding
from rayclip.evaluation.costs import Hardware
from rayclip.evaluation.schedule import Queue, Schedule
from rayclip.evaluation.shard import Evaluator
from rayclip.models import load_model
from rayclip.progress import Display
from rayclip.reports.results import read_results
from servers import wait_for

ATTACKS = "clean,fgsm,pgd:steps=2,cw:steps=2"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("rayclip.api.evaluating.Leases", partial(Leases, beat_s=0.02, expires_s=1.0))


@pytest.fixture
def computed(monkeypatch):
    """Counts the positions that are computed, by cell; two commands begin their first shards together."""
    counted, run, lock = Counter(), Evaluator.run, threading.Lock()

    def count(self, shard, *args, **options):
        with lock:
            counted.update((shard.cell.attack_label, position) for position in shard.positions)
        return run(self, shard, *args, **options)

    monkeypatch.setattr(Evaluator, "run", count)
    return counted


def evaluate(place, attacks=ATTACKS, limit=24):
    evaluation = Evaluation(
        data=["digits"], attacks=parse_attacks(attacks, {}), protocol=Protocol(eps=16 / 255), limit=limit
    )
    return evaluate_models(
        ["digits"], evaluation, Where(out=str(place), cluster=None, quiet=True, pool=PoolSize(shard_size=8))
    )


def verdicts(place):
    return {cell.id: cell.verdicts.right_N.tolist() for cell in read_results([str(place)]).cells}


def test_equal_commands_share_the_work_and_both_have_the_whole(computed, tmp_path):
    alone = evaluate(tmp_path / "alone")
    once = Counter(computed)
    computed.clear()
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(evaluate, tmp_path / "both") for _ in range(2)]
        rows = [each.result() for each in found]
    assert computed == once, "each verdict once"
    assert rows == [alone, alone]
    for name in ("results.json", "table.md"):
        assert (tmp_path / "both" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert verdicts(tmp_path / "both") == verdicts(tmp_path / "alone")
    ran = json.loads((tmp_path / "both" / "evaluations.json").read_text())
    assert ran and not list(tmp_path.rglob(".lease-*"))


def test_different_attacks_go_on_side_by_side_and_no_rows_are_lost(computed, tmp_path):
    alone = evaluate(tmp_path / "alone")
    once = Counter(computed)
    computed.clear()
    with ThreadPoolExecutor(2) as pool:
        found = [
            pool.submit(evaluate, tmp_path / "both", attacks)
            for attacks in ("clean,fgsm", "clean,pgd:steps=2,cw:steps=2")
        ]
        assert {row.attack for each in found for row in each.result()} >= {row.attack for row in alone} - {"worst"}
    assert computed == once and verdicts(tmp_path / "both") == verdicts(tmp_path / "alone")


def test_a_cell_that_another_host_holds_is_awaited_then_taken_over_and_a_report_says_so(computed, tmp_path):
    evaluate(tmp_path, "clean", limit=8)
    (cell,) = Store(str(tmp_path / "cells")).folders()
    far = {"host": "far", "machine": "far", "pid": 1, "holds": [cell]}
    Store(str(tmp_path)).write_json(".lease-ffffffffffff.json", far)
    (note,) = read_results([str(tmp_path)]).notes
    assert "far, process 1" in note and note.startswith("1 of the cells")
    evaluate(tmp_path, "clean", limit=8)
    assert Store(str(tmp_path)).size(".lease-ffffffffffff.json"), "what is finished needs no lease"
    evaluate(tmp_path, "clean", limit=16)
    assert read_results([str(tmp_path)]).notes == [] and set(computed.values()) == {1} and len(computed) == 16


def test_a_pool_gives_cells_that_it_has_not_begun_to_a_command_that_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(Share, "of", lambda size: Share(1, 1.0, 0.0))
    store, data = Store(str(tmp_path)), open_data("digits", "test")
    model = [("digits", load_model("digits").fingerprint())]
    cells = make_cells(model, [("digits", data)], parse_attacks(ATTACKS, {}), Protocol(eps=16 / 255))
    work = outstanding(cells, {"digits": chosen_positions(445, 40)}, store, 8)
    with Leases(store, beat_s=0.02) as leases, Leases(store, beat_s=0.02) as other, ThreadPoolExecutor(1) as thread:
        leases.claim(cell.id for cell in cells)
        pool = _EvaluationPool(work, store, PoolSize(), Display(quiet=True), 160, leases)
        pool.join(Hardware(name="cpu", gpus=0.0, cores=1))
        pool.schedule.join("worker")
        first = pool.schedule.start("worker", 0.0)
        waiting = thread.submit(other.wait, [cell.id for cell in cells], "evaluating")
        wait_for(lambda: pool.count_wanted() and pool.given, seconds=5, every=0.02)
        waiting.result(5)
        assert other.claim(cell.id for cell in cells) == pool.given and len(pool.given) == 2
        ran = [first]
        while not pool.schedule.done:
            pool.schedule.finish("worker")
            ran += [shard] if (shard := pool.schedule.start("worker", 1.0)) else []
    assert {pool._work[shard.cell].cell.id for shard in ran} == {cell.id for cell in cells} - pool.given
    assert len(ran) == 10 and pool.total == 80


def test_cells_that_have_not_begun_can_be_given_away():
    schedule = Schedule([Queue(samples=4, size=2, needs=("m",), seconds=1.0 + i) for i in range(3)])
    schedule.join("w")
    first = schedule.start("w", 0.0)
    assert first is not None and [schedule.has_begun(i) for i in range(3)] == [False, False, True]
    schedule.drop(1)
    schedule.reprice([5.0, 9.0, 1.0])
    order = []
    while not schedule.done:
        order.append(schedule.finish("w"))
        schedule.start("w", 1.0)
    assert {shard.cell for shard in order} == {0, 2} and len(order) == 4

"""Shards, resume and numbers, without Ray: the same evaluator that the actors run."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from conftest import tiny_clip
from rayclip.attacks import parse_attacks
from rayclip.data import batch_pixels, open_data
from rayclip.evaluation import (
    Evaluator,
    Protocol,
    Store,
    chosen_positions,
    collect_rows,
    make_cells,
    missing_shards,
    outstanding,
    wilson,
)
from rayclip.evaluation.costs import Costs, Hardware, read_timings
from rayclip.evaluation.plan import Shard, cut
from rayclip.models import load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.types import UserError

DEFAULTS = {"steps": 4, "step": 16 / 255, "substitutes": "clip-table"}


@pytest.fixture(scope="module")
def cells():
    data = open_data("digits", "test")
    attacks = parse_attacks("clean,pgd,bert,sep", DEFAULTS)
    return make_cells(
        [("digits", load_model("digits").fingerprint())], [("digits", data)], attacks, Protocol(eps=32 / 255)
    )


def run_all(cells, positions, store, shard_size, batch_size=128):
    evaluator = Evaluator(store, batch_size=batch_size)
    shards = [s for c in cells for s in missing_shards(c, positions, store, shard_size)]
    for shard in shards:
        evaluator.run(shard)
    return shards


def verdicts(store, cell):
    table = store.read_tables(store.names(f"cells/{cell.id}", ".parquet")).sort_by("position")
    return {name: table[name].to_numpy() for name in table.column_names}


def test_verdicts_do_not_depend_on_shards_or_batches(cells, tmp_path):
    positions = chosen_positions(445, 70)
    stores = [Store(str(tmp_path / name)) for name in "ab"]
    run_all(cells, positions, stores[0], shard_size=64)
    run_all(cells, positions, stores[1], shard_size=17, batch_size=5)
    for cell in cells:
        a, b = (verdicts(s, cell) for s in stores)
        for exact in ("position", "sample_id", "label", "clean_pred", "adv_pred", "steps", "queries"):
            assert np.array_equal(a[exact], b[exact]), exact
        for close in ("clean_margin", "adv_margin", "clean_confidence", "adv_confidence", "linf", "l2"):
            assert np.allclose(a[close], b[close], atol=1e-3), close
    clean, data = verdicts(stores[0], cells[0]), open_data("digits", "test")
    judge = cells[0].scorer.classifier(load_model("digits"), cells[0].class_names, cells[0].protocol.template)
    pixels = batch_pixels(data, clean["position"].tolist(), cells[0].protocol.resolution, judge.clip.image_size)
    with torch.no_grad():
        probabilities = torch.softmax(judge(pixels.float() / 255), 1).numpy()
    for when in ("clean", "adv"):
        confidence = probabilities[np.arange(70), clean[f"{when}_pred"]]
        assert np.allclose(clean[f"{when}_confidence"], confidence, atol=1e-5)


def test_what_is_on_disk_is_not_computed_again(cells, tmp_path):
    store = Store(str(tmp_path))
    half, whole = chosen_positions(445, 50), chosen_positions(445, 100)
    assert set(half) <= set(whole)
    run_all(cells[:2], half, store, 16)
    stamps = {n: (tmp_path / n).stat().st_mtime_ns for c in cells for n in store.names(f"cells/{c.id}", ".parquet")}
    again = run_all(cells[:2], whole, store, 30)
    assert sum(len(s.positions) for s in again) == 2 * 50
    assert all((tmp_path / n).stat().st_mtime_ns == t for n, t in stamps.items())
    assert run_all(cells[:2], whole, store, 7) == []
    assert len(verdicts(store, cells[0])["position"]) == 100


def test_a_lost_shard_alone_is_recomputed(cells, tmp_path):
    store, positions = Store(str(tmp_path)), chosen_positions(445, 60)
    shards = run_all(cells[1:2], positions, store, 20)
    before = verdicts(store, cells[1])
    (tmp_path / shards[1].name).unlink()
    with pytest.raises(UserError, match=r"20.*digits"):
        collect_rows(cells[1:2], {"digits": positions}, store)
    assert [s.positions for s in run_all(cells[1:2], positions, store, 20)] == [shards[1].positions]
    assert np.array_equal(verdicts(store, cells[1])["adv_pred"], before["adv_pred"])


def test_rows_carry_protocol_intervals_and_the_worst_case(cells, tmp_path):
    store, positions = Store(str(tmp_path)), {"digits": chosen_positions(445, 80)}
    run_all(cells, positions["digits"], store, 80)
    rows = {r.attack: r for r in collect_rows(cells, positions, store)}
    assert list(rows) == ["clean", "pgd-4_eps32", "bert", "sep_pgd-4_eps32", "worst"]
    right = {}
    for cell in cells:
        v = verdicts(store, cell)
        right[cell.attack_label] = (v["clean_pred"] == v["label"]) & (v["adv_pred"] == v["label"])
        row = rows[cell.attack_label]
        assert row.n == 80 and row.top1 == pytest.approx(100 * right[cell.attack_label].mean())
        assert row.ci_low < row.top1 < row.ci_high or row.top1 in (0, 100)
    assert rows["worst"].top1 == pytest.approx(100 * np.logical_and.reduce(list(right.values())).mean())
    assert rows["bert"].protocol["substitutes"] == "clip-table" and rows["bert"].eps is None
    assert rows["pgd-4_eps32"].protocol["eps"] == "32/255" and rows["pgd-4_eps32"].steps == 4
    assert json.dumps(rows["worst"].protocol)


def test_a_sequence_of_attacks_keeps_which_part_broke_each_sample(tmp_path):
    data, store, positions = open_data("digits", "test"), Store(str(tmp_path)), chosen_positions(445, 40)
    (cell,) = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", data)],
        parse_attacks("autoattack-seeds:iterations=10", DEFAULTS),
        Protocol(eps=24 / 255),
    )
    run_all([cell], positions, store, shard_size=20)
    v = verdicts(store, cell)
    assert np.array_equal(v["part"] > 0, (v["clean_pred"] == v["label"]) & (v["adv_pred"] != v["label"]))
    assert {0, 1} <= set(v["part"]) <= {0, 1, 2}
    (row,) = collect_rows([cell], {"digits": positions}, store)
    assert row.attack == "autoattack-seeds_eps24" and row.protocol["parts"] == "apgd-ce, apgd-dlr"


def test_attacked_images_stay_in_the_budget_and_text_attacks_leave_them(cells, tmp_path):
    store, positions = Store(str(tmp_path)), chosen_positions(445, 40)
    run_all(cells, positions, store, 40)
    for cell in cells:
        v = verdicts(store, cell)
        assert v["linf"].max() <= (cell.eps or 0) + 1e-6
        wrong = v["clean_pred"] != v["label"]
        assert (v["queries"][wrong] == 0).all()
    texts = [json.loads((tmp_path / n).read_text()) for n in store.names("texts", ".json")]
    assert len(texts) == 1, "BERT-Attack and Sep-Attack share one set of adversarial prompts"
    assert [t["class"] for t in texts[0]][:2] == ["zero", "one"] and texts[0][0]["clean"] != texts[0][0]["adversarial"]


def test_a_cells_id_changes_with_everything_that_can_change_a_number(cells):
    cell = cells[1]
    changed = [
        replace(cell, model_fingerprint="x"),
        replace(cell, data_fingerprint="x"),
        replace(cell, class_names=("a", "b")),
        replace(cell, attack=replace(cell.attack, steps=5)),
        replace(cell, attack=replace(cell.attack, stop="final")),
        replace(cell, attack=replace(cell.attack, eps=1 / 255)),
        *(
            replace(cell, protocol=replace(cell.protocol, **change))
            for change in ({"seed": 1}, {"resolution": "model"}, {"template": "a {}"})
        ),
    ]
    assert len({cell.id, *(c.id for c in changed)}) == len(changed) + 1
    assert replace(cell, model="local-dir:/elsewhere", data="other/path.parquet").id == cell.id


def test_a_model_that_changed_after_planning_is_refused(cells, tmp_path):
    save_checkpoint(tiny_clip(seed=1), tmp_path / "m", {})
    cell = replace(cells[0], model=f"local-dir:{tmp_path / 'm'}")
    shard = missing_shards(cell, [0, 1], Store(str(tmp_path / "out")), 2)[0]
    with pytest.raises(UserError):
        Evaluator(Store(str(tmp_path / "out"))).run(shard)


def test_a_budget_is_asked_for():
    with pytest.raises(UserError, match="--eps"):
        make_cells([("m", "f")], [("digits", open_data("digits", "test"))], parse_attacks("pgd", {}), Protocol())


@pytest.mark.parametrize(("right", "n"), [(0, 10), (5, 10), (445, 445), (300, 445), (1, 50_000)])
def test_wilson_intervals_are_scipys(right, n):
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-9)


def test_a_limit_takes_images_from_everywhere():
    assert chosen_positions(10, None).tolist() == list(range(10))
    assert chosen_positions(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert chosen_positions(10, 99).tolist() == list(range(10))


def test_damaged_result_files_are_named(cells, tmp_path):
    store = Store(str(tmp_path))
    store.write(f"cells/{cells[0].id}/x.parquet", b"damaged")
    with pytest.raises(UserError, match=r"x\.parquet"):
        missing_shards(cells[0], [0], store, 1)


def test_an_unknown_kind_of_uri_is_explained():
    with pytest.raises(UserError):
        Store("nonsense://x/y").read("z")


def test_shards_are_made_when_they_are_asked_for(cells, tmp_path):
    many = np.arange(2_560_000)
    store = Store(str(tmp_path))
    work = outstanding([cells[0], replace(cells[0], model="another name"), cells[1]], {"digits": many}, store, 256)
    assert [shards.cell for shards in work] == [replace(cells[0], model="another name"), cells[1]]
    assert sum(map(len, work)) == 20_000
    assert all(np.shares_memory(shards.positions, many) for shards in work), "a million shards are a few megabytes"
    assert work[0][9_999].positions == tuple(range(2_559_744, 2_560_000))
    costs = Costs()
    costs.add(cells[0], 10, 10.0)
    parts = cut(work, costs, workers=2000, smallest=16)
    assert all(np.shares_memory(part.positions, many) for part in parts)
    for cell in {part.cell.id for part in parts}:
        samples = np.concatenate([part.positions for part in parts if part.cell.id == cell])
        assert np.array_equal(samples, many)


def test_images_are_read_while_earlier_ones_are_attacked(cells, tmp_path, monkeypatch):
    events = []

    def slow(data, positions, *more):
        events.append(("read", positions[0], time.monotonic()))
        time.sleep(0.05)
        return batch_pixels(data, positions, *more)

    class Timed(Evaluator):
        def _batch(self, cell, data, victim, prompts, positions, pixels, **options):
            time.sleep(0.1)
            found = super()._batch(cell, data, victim, prompts, positions, pixels, **options)
            events.append(("attacked", positions[0], time.monotonic()))
            return found

    monkeypatch.setattr("rayclip.evaluation.reading.batch_pixels", slow)
    done = Timed(Store(str(tmp_path)), batch_size=4).run(Shard(cell=cells[0], positions=tuple(range(10))))
    assert done.reading.waiting < 0.1 < 0.15 < done.reading.decoding, "only for the first batch"
    at = {(what, first): when for what, first, when in events}
    assert sorted(at) == [("attacked", 0), ("attacked", 4), ("attacked", 8), ("read", 0), ("read", 4), ("read", 8)]
    assert at["read", 4] < at["attacked", 0] and at["read", 8] < at["attacked", 4]


class Short(Evaluator):
    """Memory for so many images at once; torch raises the same class and says the same."""

    room = 0
    seen = ()
    in_backward = False

    def _batch(self, cell, data, victim, prompts, positions, pixels, **options):
        assert len(pixels) == len(positions)
        self.seen = (*self.seen, len(positions))
        if len(positions) > self.room:
            if self.in_backward:
                with torch.inference_mode(False), torch.enable_grad():
                    Fails.apply(torch.zeros(1, requires_grad=True), self.error).backward()
            raise self.error
        return super()._batch(cell, data, victim, prompts, positions, pixels, **options)


class Fails(torch.autograd.Function):
    """The identity; its backward raises."""

    @staticmethod
    def forward(ctx, value, error):
        ctx.error = error
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


@pytest.mark.ci
@pytest.mark.parametrize(
    ("error", "in_backward"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_short_memory_halves_the_batch_and_changes_no_verdict(cells, tmp_path, error, in_backward):
    positions = chosen_positions(445, 40)
    enough, short = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    run_all(cells[1:2], positions, enough, 40)
    evaluator = Short(short, batch_size=32)
    evaluator.error, evaluator.room, evaluator.in_backward = error, 5, in_backward
    (shard,) = missing_shards(cells[1], positions, short, 40)
    evaluator.run(shard)
    assert evaluator.seen == (32, 16, 8, *[4] * 10), "what is done stays done"
    evaluator.run(shard)
    assert evaluator.seen[13:] == (4,) * 10, "it is remembered"
    a, b = (verdicts(s, cells[1]) for s in (enough, short))
    for exact in ("position", "sample_id", "label", "clean_pred", "adv_pred", "steps", "queries"):
        assert np.array_equal(a[exact], b[exact]), exact
    evaluator.room = 0
    with pytest.raises(UserError, match=r"digits.*pgd-4_eps32.*cpu"):
        evaluator.run(shard)


class Estimate:
    """Memory that is taken to hold so many images."""

    def __init__(self, images):
        self.images, self.evaluator = images, None

    def begin(self):
        pass

    def has_room_for_twice(self):
        return 2 * self.evaluator.seen[-1] <= self.images


@pytest.mark.parametrize(("estimated", "seen"), [(40, [8, 16, *[32] * 2, 12]), (80, [8, 16, 32, 44, 32, 12])])
def test_batches_grow_while_memory_allows_and_change_no_verdict(cells, tmp_path, monkeypatch, estimated, seen):
    """There is room for 40 images, which the estimate knows, or not."""
    monkeypatch.setattr("rayclip.evaluation.batching.GPU_BATCHES", (8, 1024))
    positions, memory = chosen_positions(445, 100), Estimate(estimated)
    enough, short = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    run_all(cells[1:2], positions, enough, 100)
    memory.evaluator = evaluator = Short(short, memory=memory)
    evaluator.error, evaluator.room = torch.OutOfMemoryError("CUDA out of memory."), 40
    shards = [missing_shards(cell, positions, short, 100)[0] for cell in cells[:2]]
    evaluator.run(shards[1])
    assert list(evaluator.seen) == seen
    size = max(n for n in seen if n <= 40)
    evaluator.run(shards[1], batch_size=20)
    assert set(evaluator.seen[len(seen) :]) == {20}, "it may be asked for less"
    before = len(evaluator.seen)
    evaluator.run(shards[1])
    assert evaluator.seen[before] == size and max(evaluator.seen[before:]) == size, "it is remembered"
    before = len(evaluator.seen)
    evaluator.run(shards[0])
    assert evaluator.seen[before] == 8, "another attack may take more"
    a, b = (verdicts(s, cells[1]) for s in (enough, short))
    for exact in ("position", "sample_id", "label", "clean_pred", "adv_pred", "steps", "queries"):
        assert np.array_equal(a[exact], b[exact]), exact


def test_other_errors_are_not_taken_for_short_memory(cells, tmp_path):
    evaluator = Short(Store(str(tmp_path)), batch_size=32)
    evaluator.error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        evaluator.run(missing_shards(cells[0], [0, 1], evaluator.store, 2)[0])
    assert evaluator.seen == (2,)


def test_results_say_what_they_took_and_costs_are_estimated_from_kin(cells, tmp_path):
    store, positions = Store(str(tmp_path)), chosen_positions(445, 64)
    clean, pgd, bert, sep = cells
    run_all([pgd], positions, store, 32)
    timings = read_timings(pgd.id, store)
    assert [t.samples for t in timings] == [32, 32] and all(t.seconds > 0 for t in timings)
    assert {t.hardware for t in timings} == {Hardware.here(torch.device("cpu"))}
    assert timings[0].hardware.unit == "core"
    costs = Costs()
    assert not costs.measured and costs.seconds(sep) == sep.cost and costs.basis(sep) == "forwards"
    costs.read([clean, pgd], store, Hardware(name="another GPU", gpus=1.0, cores=1))
    assert not costs.measured, "other hardware says nothing"
    costs.read([clean, pgd], store, timings[0].hardware)
    mean = sum(t.seconds for t in timings) / 64
    assert costs.seconds(pgd) == pytest.approx(mean) and costs.basis(pgd) == "measured"
    assert costs.seconds(sep) == pytest.approx(mean / pgd.cost * sep.cost) and costs.basis(sep) == "same model"
    elsewhere = replace(pgd, data_fingerprint="other", data="other")
    assert costs.seconds(elsewhere) == pytest.approx(mean) and costs.basis(elsewhere) == "same kind"
    assert costs.basis(replace(clean, model_fingerprint="other")) == "forwards"
    costs.add(bert, 10, 20.0)
    assert costs.seconds(bert) == 2.0


def test_measuring_leaves_nothing(cells, tmp_path):
    store = Store(str(tmp_path / "none"))
    done = Evaluator(store).run(missing_shards(cells[0], [0, 1, 2], store, 3)[0], keep=False)
    assert done.samples == 3 and done.seconds > 0 and not (tmp_path / "none").exists()

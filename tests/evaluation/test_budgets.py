"""Budgets belong to attacks, and what attacks within different budgets or norms leave is never mixed."""

import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rayclip.api.checks import evaluations_of
from rayclip.api.logbook import attack_params, metric_names, worst_case
from rayclip.attacks import attack_as_described, parse_attacks
from rayclip.evaluation import Protocol, Store, collect_rows, make_cells
from rayclip.evaluation.aggregate import Ball, worst_accuracy, worst_cases
from rayclip.evaluation.alarms import alarms
from rayclip.reports.build import build
from rayclip.reports.formats import document_csv, document_markdown
from rayclip.reports.leaderboard import Board, rows_of, threats
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from rayclip.reports.rows import result_grids
from rayclip.types import UserError

TEXT = "bert:substitutes=clip-table"
N = 40


def cells_of(attacks, *eps, datasets=(("set", 10),)):
    named = [
        (
            name,
            SimpleNamespace(
                name=name, fingerprint=name, other_names=(), class_names=tuple(f"class {i}" for i in range(classes))
            ),
        )
        for name, classes in datasets
    ]
    parsed = parse_attacks(attacks, {"substitutes": "clip-table"})
    return make_cells([("m", "m")], named, parsed, Protocol(eps=eps))


def judged(store, cells, chosen=None):
    """Verdicts on disk for each cell: `chosen` by label, else random ones; `(rows, right by (label, data set))`."""
    rights = {}
    for number, cell in enumerate(cells):
        right = (chosen or {}).get(cell.attack_label)
        right = np.random.default_rng(number).random(N) < 0.8 if right is None else np.asarray(right)
        rights[cell.attack_label, cell.dataset] = right
        columns = {
            "position": np.arange(N),
            "label": np.zeros(N, int),
            "clean_pred": np.zeros(N, int),
            "adv_pred": np.where(right, 0, 1),
            "clean_margin": np.ones(N),
            "adv_margin": np.zeros(N),
        }
        store.write_json(f"cells/{cell.id}/cell.json", cell.record())
        store.write_table(f"cells/{cell.id}/a.parquet", columns)
    positions = {cell.data: np.arange(N) for cell in cells}
    return collect_rows(cells, positions, store), rights


def survives(rights, *labels, dataset="set"):
    return pytest.approx(100 * np.logical_and.reduce([rights[label, dataset] for label in labels]).mean())


def test_every_attack_that_names_no_budget_runs_at_each_and_the_others_at_their_own():
    cells = cells_of(f"clean,pgd,pgd-l2:eps=128/255,{TEXT},sep:eps=3/255", 1 / 255, 2 / 255, 4 / 255)
    assert [cell.attack_label for cell in cells] == [
        "clean", "pgd-10_eps1", "pgd-10_eps2", "pgd-10_eps4", "pgd-l2-10_eps128", "bert", "sep_pgd-10_eps3",
    ]  # fmt: skip
    said = [cell.describe() for cell in cells]
    assert [p.get("eps") for p in said] == [None, "1/255", "2/255", "4/255", "128/255", None, "3/255"]
    assert said[4]["norm"] == "l2" and len({cell.id for cell in cells}) == 7


def test_a_cell_does_not_depend_on_how_its_budget_was_written():
    ((one,), (two,), (several, _)) = cells_of("pgd:eps=2/255"), cells_of("pgd", 2 / 255), cells_of("pgd", 2 / 255, 0.1)
    assert one.id == two.id == several.id
    assert len(cells_of("pgd,pgd:eps=2/255", 2 / 255)) == 1


def test_the_protocol_shows_the_step_that_follows_from_each_budget():
    cells = cells_of("pgd,pgd:steps=100,cw:step=1/255,pgd-l2:eps=128/255", 32 / 255, 1 / 255)
    assert [(c.attack_label, c.describe()["step"]) for c in cells] == [
        ("pgd-10_eps32", "8/255"), ("pgd-10_eps1", "1/255"), ("pgd-100_eps32", "1/255"), ("pgd-100_eps1", "1/255"),
        ("cw-10_eps32", "1/255"), ("cw-10_eps1", "1/255"), ("pgd-l2-10_eps128", "32/255"),
    ]  # fmt: skip


@pytest.mark.parametrize("eps", ["8", "1", "255/255", "-1/255"])
def test_budgets_that_cannot_be_are_refused_where_they_are_written(eps):
    with pytest.raises(UserError, match="eps"):
        parse_attacks(f"pgd:eps={eps}", {})


def test_an_l2_budget_may_be_longer_than_one_pixel():
    (cell,) = cells_of("pgd-l2:eps=3.0")
    assert cell.attack_label == "pgd-l2-10_eps765" and cell.eps == 3.0
    (cell,) = cells_of("apgd-ce:norm=l2,eps=1.5")
    assert cell.eps == 1.5
    with pytest.raises(UserError, match="128/255"):
        parse_attacks("pgd-l2:eps=128", {})


def test_a_missing_budget_is_one_sentence():
    with pytest.raises(UserError, match=r"pgd.*--eps"):
        cells_of("pgd,pgd-l2:eps=128/255")


@pytest.mark.parametrize("attack", ["pgd:eps=2/255", "pgd-l2:eps=3.0,steps=7", "autoattack:eps=1/255", "clean", TEXT])
def test_described_attacks_come_back_with_their_budget(attack):
    (cell,) = cells_of(attack)
    again = attack_as_described(cell.describe())
    (same,) = make_cells(
        [("m", "m")],
        [("set", SimpleNamespace(name="set", fingerprint="set", other_names=(), class_names=cell.class_names))],
        [again],
        Protocol(),
    )
    assert same.id == cell.id


def test_three_budgets_make_three_worst_cases_and_norms_never_meet(tmp_path):
    cells = cells_of(f"clean,pgd,cw,{TEXT},pgd-l2:eps=128/255,apgd-ce:norm=l2,eps=128/255", 1 / 255, 2 / 255, 4 / 255)
    rows, rights = judged(Store(str(tmp_path)), cells)
    worst = {row.attack: row for row in rows if row.is_worst}
    assert list(worst) == ["worst_eps1", "worst_eps2", "worst_eps4", "worst_l2_eps128"]
    for eps in (1, 2, 4):
        row = worst[f"worst_eps{eps}"]
        assert row.top1 == survives(rights, "clean", f"pgd-10_eps{eps}", f"cw-10_eps{eps}", "bert")
        assert row.eps == pytest.approx(eps / 255)
    l2 = ("pgd-l2-10_eps128", "apgd-ce-100_l2_eps128")
    assert worst["worst_l2_eps128"].top1 == survives(rights, "clean", "bert", *l2)
    assert worst["worst_l2_eps128"].protocol["worst_of"] == ["clean", "bert", *l2]


def test_texts_alone_and_one_budget_have_one_worst_case_by_that_name(tmp_path):
    for attacks, eps in ((f"clean,{TEXT},bert:substitutes=clip-table,k=5", ()), (f"clean,pgd,{TEXT}", (1 / 255,))):
        rows, _ = judged(Store(str(tmp_path / str(eps))), cells_of(attacks, *eps))
        assert [row.attack for row in rows if row.is_worst] == ["worst"]
    rows, _ = judged(Store(str(tmp_path / "one")), cells_of("clean,pgd,pgd-l2:eps=128/255", 1 / 255))
    assert not any(row.is_worst for row in rows)  # one attack within each ball


def test_reports_tables_the_leaderboard_and_mlflow_say_the_same(tmp_path):
    attacks = f"clean,pgd,cw,{TEXT},pgd-l2:eps=128/255,apgd-ce:norm=l2,eps=128/255"
    rows, rights = judged(Store(str(tmp_path)), cells_of(attacks, 1 / 255, 4 / 255))
    worst = {row.attack: row.top1 for row in rows if row.is_worst}
    (section,) = sections(read_results([str(tmp_path)]))
    (subject,) = section.subjects
    found = {a.label: section.number(subject, "set", a) for a in section.attacks if a.kind == "worst"}
    assert {label: number.top1 for label, number in found.items()} == pytest.approx(worst)
    assert section.main.label == "worst_eps4"
    metrics = metric_names(rows)
    assert {k: v for k, v in metrics.items() if "worst" in k} == {
        f"{k}/set": pytest.approx(v) for k, v in worst.items()
    }
    header = result_grids(rows)[0].header
    assert header[-3:] == ("worst case 1/255", "worst case 4/255", "worst case l2 128/255")
    boards = {threat.name: threat for threat in threats(section)}
    assert {"l∞ 1/255, images", "l∞ 4/255, images", "l2 128/255, images", "texts"} <= set(boards)
    rows = rows_of(Board(protocol="own", differs="", section=section))
    robust = {row.attributes["threat"]: row.cells["robust"].value for row in rows}
    assert robust["l2 128/255, all attacks"] == pytest.approx(worst["worst_l2_eps128"])
    assert robust["l∞ 4/255, images"] == survives(rights, "clean", "pgd-10_eps4", "cw-10_eps4")


def test_a_champion_is_chosen_by_all_worst_cases_alike(tmp_path):
    cells = cells_of("clean,pgd", 1 / 255, 2 / 255)
    rows, rights = judged(Store(str(tmp_path)), cells)
    expected = np.mean([rights[f"pgd-10_eps{eps}", "set"].mean() for eps in (1, 2)])
    assert worst_accuracy(rows) == worst_case(rows) == pytest.approx(100 * expected)
    assert worst_accuracy([row for row in rows if row.attack == "clean"]) is None


def test_alarms_compare_attacks_of_one_ball_only(tmp_path):
    """A black box at 4/255 leaves less than PGD at 1/255, and PGD-30 at 1/255 more than PGD-10 at 4/255: as it is."""
    half, few = np.arange(N) < N // 2, np.arange(N) < 4
    chosen = {"pgd-10_eps1": half, "square-5000_eps4": few, "pgd-30_eps1": half, "pgd-10_eps4": few}
    cells = cells_of("clean,pgd:eps=1/255,pgd:eps=4/255,pgd:steps=30,eps=1/255,square:eps=4/255")
    store = Store(str(tmp_path))
    rows, _ = judged(store, cells, chosen)
    positions = {"set": np.arange(N)}
    assert alarms(cells, rows, positions, store) == []
    within = cells_of("clean,pgd,pgd:steps=30,square", 4 / 255)
    chosen = {"pgd-10_eps4": half, "pgd-30_eps4": np.arange(N) < N - 1, "square-5000_eps4": few}
    rows, _ = judged(Store(str(tmp_path / "one")), within, chosen)
    said = " ".join(alarms(within, rows, positions, Store(str(tmp_path / "one"))))
    assert "needs no gradients" in said and "with fewer steps" in said


def test_worst_cases_are_in_the_order_of_norms_and_budgets():
    protocols = [{"attack": "a", "eps": eps} for eps in ("16/255", "4/255", "0.5/255")]
    cases = worst_cases([*protocols, {"attack": "b", "eps": "1/255", "norm": "l2"}, {"attack": "bert"}])
    assert [case.ball for case in cases] == [
        Ball("linf", "0.5/255"), Ball("linf", "4/255"), Ball("linf", "16/255"), Ball("l2", "1/255"),
    ]  # fmt: skip


def test_other_models_are_evaluated_at_the_budgets_of_a_leaderboards_first_folder(tmp_path):
    cells = cells_of("clean,pgd,pgd-l2:eps=128/255", 1 / 255, 2 / 255)
    judged(Store(str(tmp_path)), cells)
    (again,) = evaluations_of(read_results([str(tmp_path)]))
    data = SimpleNamespace(name="set", fingerprint="set", other_names=(), class_names=cells[0].class_names)
    repeated = make_cells([("m", "m")], [("set", data)], again.attacks, again.protocol)
    assert {cell.id for cell in repeated} == {cell.id for cell in cells}


def test_two_attacks_of_one_label_are_two_columns(tmp_path):
    cells = cells_of("clean,pgd:step=1/255,pgd:step=0.5/255", 1 / 255)
    rows, rights = judged(Store(str(tmp_path)), [cells[0]])
    chosen = {"pgd-10_eps1": np.arange(N) < 8}
    store = Store(str(tmp_path / "b"))
    judged(store, cells[:2], chosen)
    judged(store, [cells[2]], {"pgd-10_eps1": np.arange(N) < 16})
    judged(store, [cells[0]])
    rows = collect_rows(cells, {"set": np.arange(N)}, store)
    assert [row.attack for row in rows] == ["clean", "pgd-10_eps1 step 1/255", "pgd-10_eps1 step 0.5/255", "worst"]
    (table,) = result_grids(rows)
    assert table.header[2:4] == ("pgd-10 step 1/255 1/255", "pgd-10 step 0.5/255 1/255")
    assert [cell.text for cell in table.rows[0][1][1:3]] == ["20.0", "40.0"]
    assert metric_names(rows)["robust/pgd-10_eps1_step_0.5_255/set"] == 40.0
    assert rights["clean", "set"].any()


SUITE = (("pcam", 2), ("three", 3), ("ten", 10))


@pytest.mark.parametrize("attack", ["autoattack", "autoattack-seeds", "fab-t"])
def test_few_and_many_classes_share_a_column_and_its_average(tmp_path, attack):
    """Below four classes APGD-DLR stands for APGD-T, below three neither runs: it is said, and splits nothing."""
    cells = cells_of(f"clean,{attack}", 2 / 255, datasets=SUITE)
    rows, rights = judged(Store(str(tmp_path)), cells)
    label = cells[1].attack_label
    mean = 100 * np.mean([rights[label, name].mean() for name, _ in SUITE])
    *_, average = result_grids(rows)
    assert len(average.header) == 3 and average.rows[0][1][1].value == pytest.approx(mean, abs=0.05)
    assert metric_names(rows)[f"avg/{label}"] == pytest.approx(mean)
    (section,) = sections(read_results([str(tmp_path)]))
    assert [a.label for a in section.attacks] == ["clean", label]
    assert section.number(section.subjects[0], "average", section.attacks[1]).top1 == pytest.approx(mean)
    document = build(read_results([str(tmp_path)]))
    lines = list(csv.DictReader(io.StringIO(document_csv(document))))
    (line,) = [x for x in lines if (x["dataset"], x["attack"]) == ("average", label)]
    assert float(line["top1"]) == pytest.approx(mean, abs=1e-4)
    if attack != "fab-t":
        assert set(json.loads(line["protocol"])["parts"]) == {"pcam", "three", "ten"}
    if attack == "autoattack-seeds":
        said = "apgd-ce on pcam; apgd-ce, apgd-dlr on three, ten"
        assert (
            "autoattack-seeds 2/255 on pcam: " in average.caption
            and attack_params(rows)[f"attack.{label}.parts"] == said
        )
        page = document_markdown(document, {})
        assert "autoattack-seeds 2/255 on pcam: " in page and "autoattack-seeds 2/255 on ten, three: " in page


def test_an_attack_that_did_not_run_on_all_data_sets_has_no_average(tmp_path):
    cells = cells_of("clean,pgd", 1 / 255, datasets=SUITE)
    rows, _ = judged(Store(str(tmp_path)), cells)
    fewer = [row for row in rows if (row.attack, row.dataset) != ("pgd-10_eps1", "ten")]
    assert set(metric_names(fewer)) >= {"avg/clean"} and "avg/pgd-10_eps1" not in metric_names(fewer)


def test_a_budget_in_the_call_of_a_cell_is_the_attacks():
    (cell,) = cells_of("pgd", 1 / 255)
    assert cell.eps == cell.attack.eps == 1 / 255
    assert replace(cell, attack=cell.attack.within(None)).id == cell.id

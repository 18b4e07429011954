"""Defended models as cells: what is run, what a row says, and that shards and batches have no say."""

import dataclasses

import numpy as np
import pytest
import torch

from evaluation.test_evaluation import run_all, verdicts
from rayclip.attacks import Samples, parse_attacks
from rayclip.data import batch_pixels, open_data
from rayclip.data.captions import BUNDLED, bind_captions
from rayclip.defenses import Aim, Defended, parse_aims, parse_defenses
from rayclip.evaluation import Protocol, Store, collect_rows, make_cells
from rayclip.evaluation.alarms import alarms
from rayclip.models import ZeroShot, load_model
from rayclip.models.scorers import parse_scorers
from rayclip.reports.rows import result_grids
from rayclip.rng import sample_keys
from rayclip.types import UserError

DEFAULTS = {"steps": 4, "step": 16 / 255, "substitutes": "clip-table"}


def cells_of(defenses, attacks="clean,pgd,bert", aims="ignore,bpda", draws=2, eps=32 / 255):
    return make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks(attacks, DEFAULTS),
        Protocol(eps=eps),
        parse_defenses(defenses),
        parse_aims(aims, draws),
    )


def test_attacks_that_ask_the_victim_are_aimed_both_ways():
    cells = cells_of("none,tte,rn", "clean,pgd,apgd-ce,bert,transfer:source=digits")
    found = [(c.describe()["defense"].partition(" ")[0], c.attack_label, c.describe().get("draws")) for c in cells]
    plain = ["clean", "pgd-4_eps32", "apgd-ce-100_eps32", "bert", "transfer_pgd-4_from_digits_eps32"]
    behind = [
        ("clean", None),
        ("pgd-4_eps32", None),
        ("pgd-4_eps32_bpda", 1),
        ("apgd-ce-100_eps32", None),
        ("apgd-ce-100_eps32_bpda", 1),
        ("bert", None),
        ("transfer_pgd-4_from_digits_eps32", None),
    ]
    assert found == [
        *(("none", label, None) for label in plain),
        *(("tte", *one) for one in behind),
        *(("rn", label, draws and 2) for label, draws in behind),
    ]
    assert len({c.id for c in cells}) == len(cells)
    assert {c.attack.stop for c in cells if c.attack.name == "pgd" and c.defense} == {"final"}
    assert {c.attack.stop for c in cells if c.attack.name == "pgd" and not c.defense} == {"first_success"}


def test_an_undefended_cell_is_the_same_whatever_stands_beside_it():
    alone, beside = cells_of("none"), cells_of("ttc,none", aims="straight")
    assert {c.id for c in alone} == {c.id for c in beside if not c.defense}
    assert "aim" not in alone[1].describe() and alone[1].describe()["defense"] == "none"


def test_settings_of_a_defence_are_another_cell():
    ids = [cells_of(d, "pgd", "ignore")[0].id for d in ("ttc", "ttc:tau=0.1", "ttc+rn", "rn+ttc")]
    ids += [cells_of("rn", "pgd", "bpda", draws)[0].id for draws in (1, 2)]
    assert len(set(ids)) == 6


@pytest.mark.ci
def test_verdicts_of_defended_models_do_not_depend_on_shards_or_batches(tmp_path):
    cells = cells_of("rn:eps=32/255,ttc+tte")
    positions = np.arange(14)
    stores = [Store(str(tmp_path / name)) for name in "ab"]
    run_all(cells, positions, stores[0], shard_size=40)
    run_all(cells, positions, stores[1], shard_size=8, batch_size=3)
    for cell in cells:
        a, b = (verdicts(s, cell) for s in stores)
        for exact in ("position", "clean_pred", "adv_pred", "queries"):
            assert np.array_equal(a[exact], b[exact]), (cell.attack_label, exact)
        assert np.allclose(a["adv_margin"], b["adv_margin"], atol=1e-3)
        if cell.attack.name == "clean":  # one draw judges before and after
            assert np.array_equal(a["clean_margin"], a["adv_margin"])


def test_rows_and_tables_show_both_columns_side_by_side(tmp_path):
    cells = cells_of("none,tte", "clean,pgd")
    positions, store = np.arange(60), Store(str(tmp_path))
    run_all(cells, positions, store, 60)
    rows = collect_rows(cells, {"digits": positions}, store)
    found = {(r.who(), r.attack): r.top1 for r in rows}
    assert found["digits + tte", "worst"] <= min(v for (who, _), v in found.items() if who == "digits + tte")
    assert found["digits + tte", "pgd-4_eps32_bpda"] < found["digits + tte", "clean"]
    (table,) = result_grids(rows, {"digits": "mine"})
    assert table.header == ("model", "clean", "pgd-4 32/255", "pgd-4 bpda 32/255", "worst case")
    (plain, first), (defended, second) = table.rows
    assert (plain, defended) == ("mine", "mine + tte")
    assert first[2].text == "" and all(cell.text for cell in second)
    (defended,) = [note for note in table.notes if "on defended models" in note]
    assert defended.endswith("steps 4, step 16/255, norm linf, start random, stop final")
    assert "tte: tte (crop 0.875)" in table.caption and "ignore the defence unless" in table.caption


def test_examples_made_through_another_defence_are_judged_by_this_one(tmp_path):
    """By hand; and what several cells judge is made once, whoever asks first, without a verdict that differs."""
    source = "rn:eps=32/255"
    cells = cells_of(f"{source},tte,et3", "pgd", f"ignore,bpda,{source}")
    kinds = [(c.defense[0].name, c.attack_label) for c in cells]
    plain, through, moved = "pgd-4_eps32", "pgd-4_eps32_bpda", "pgd-4_eps32_from-rn"
    assert kinds == [("rn", plain), ("rn", through)] + [(n, a) for n in ("tte", "et3") for a in (plain, through, moved)]
    assert cells[4].describe() | {"aim": "bpda", "draws": 1} == cells[3].describe() | {
        "source_defense": "rn (eps 32/255)"
    }
    positions, store = np.arange(24), Store(str(tmp_path / "all"))
    run_all(cells, positions, store, 12)
    for i, cell in enumerate(cells):
        alone = Store(str(tmp_path / str(i)))
        run_all([cell], positions, alone, 12)
        one, other = (verdicts(s, cell) for s in (store, alone))
        assert all(np.array_equal(one[c], other[c]) for c in ("clean_pred", "adv_pred", "queries", "steps", "linf"))
    data, victim = open_data("digits", "test"), ZeroShot(load_model("digits"), open_data("digits", "test").class_names)
    images = batch_pixels(data, positions, "native", 8).float() / 255
    labels, ids = torch.from_numpy(data.labels[positions]), data.ids[positions].tolist()
    drawn, keys = (sample_keys(ids, 0, data.fingerprint, what) for what in ("defense", "pgd"))
    noise, judge = parse_defenses(source)[0], Defended(victim, parse_defenses("tte")[0], drawn)
    with torch.no_grad():
        right = judge(images).argmax(1) == labels
    samples = Samples(images, labels, keys, right)
    made = cells[4].attack.run(Defended(victim, noise, drawn, Aim(gradient="bpda", draws=2)), samples)
    with torch.no_grad():
        said = judge(made.images_BCHW).argmax(1)
    assert np.array_equal(said.numpy(), verdicts(store, cells[4])["adv_pred"])
    with pytest.raises(UserError, match="--aim 'bdpa'"):
        parse_aims("ignore,bdpa", 2)


def test_an_attack_through_the_defence_that_does_worse_is_noticed(tmp_path):
    cells = cells_of("tte", "pgd")
    positions, store = np.arange(30), Store(str(tmp_path))
    run_all(cells, positions, store, 30)
    rows = collect_rows(cells, {"digits": positions}, store)
    assert not any("goes through" in said for said in alarms(cells, rows, {"digits": positions}, store))
    worse = [dataclasses.replace(r, top1=90.0) if r.attack.endswith("bpda") else r for r in rows]
    (said,) = (s for s in alarms(cells, worse, {"digits": positions}, store) if "goes through" in s)
    assert said.startswith("digits + tte on digits, pgd-4_eps32_bpda goes through the defence and leaves 90.0 %")


def test_repeated_judgements_count_an_image_only_if_all_are_right(tmp_path):
    """By hand from the cells of one judgement each; what does not draw is judged once and keeps its name."""
    cells = cells_of("rn:eps=48/255,tte", "clean,pgd", "ignore")
    several = [dataclasses.replace(c, protocol=dataclasses.replace(c.protocol, judgements=4)) for c in cells]
    assert [a.id == b.id for a, b in zip(cells, several, strict=True)] == [False, False, True, True]
    positions, stores = np.arange(40), [Store(str(tmp_path / name)) for name in "abc"]
    run_all(several, positions, stores[0], 40)
    run_all(several, positions, stores[1], shard_size=7, batch_size=3)
    run_all(cells, positions, stores[2], 40)
    for cell, single in zip(several[:2], cells[:2], strict=True):
        found, again, once = (verdicts(s, c) for s, c in ((stores[0], cell), (stores[1], cell), (stores[2], single)))
        assert np.array_equal(found["adv_pred"], again["adv_pred"])
        assert np.array_equal(found["right_share"], again["right_share"])
        assert np.array_equal(found["clean_pred"], once["clean_pred"]) and "right_share" not in once
        all_right = found["adv_pred"] == found["label"]
        assert np.array_equal(all_right, found["right_share"] == 1) and (found["right_share"] * 4 % 1 == 0).all()
        assert (found["right_share"] > 0)[once["adv_pred"] == once["label"]].all()
        assert (found["adv_margin"] <= once["adv_margin"] + 1e-5).all() and 0 < all_right.mean() < 1
    rows = collect_rows(several, {"digits": positions}, stores[0])
    by_name = {(r.defense.partition(":")[0], r.attack): r for r in rows}
    noisy = by_name["rn", "pgd-4_eps32"]
    share = verdicts(stores[0], several[1])
    right = np.where(share["clean_pred"] == share["label"], share["right_share"], 0)
    assert noisy.mean == pytest.approx(100 * right.mean()) and noisy.mean > noisy.top1
    assert by_name["tte", "pgd-4_eps32"].mean is None
    said = [s for s in alarms(several, rows, {"digits": positions}, stores[0]) if "judgements" in s]
    assert len(said) == sum(r.mean is not None and r.mean > r.ci_high for r in rows)
    unsure = [dataclasses.replace(r, mean=r.mean and 100.0) for r in rows]
    assert sum("4 judgements" in s for s in alarms(several, unsure, {"digits": positions}, stores[0])) == 2


def test_a_budget_that_is_no_use_is_noticed(tmp_path):
    cells = cells_of("tte", "apgd-ce:iterations=3", eps=(8 / 255, 32 / 255))
    positions, store = np.arange(30), Store(str(tmp_path))
    run_all(cells, positions, store, 30)
    rows = collect_rows(cells, {"digits": positions}, store)
    assert not any("no less than" in said for said in alarms(cells, rows, {"digits": positions}, store))
    level = [dataclasses.replace(r, top1=80.0) for r in rows]
    (said,) = (s for s in alarms(cells, level, {"digits": positions}, store) if "no less than" in s)
    assert said.startswith("digits + tte on digits, apgd-ce-3_eps32_bpda leaves 80.0 %")


@pytest.mark.parametrize(
    "attack",
    [
        "feature",
        "semantic",
        "cw",
        "sep",
        "co-attack",
        pytest.param("sga", marks=pytest.mark.ci),
        "square:queries=20",
        "fgsm",
    ],
)
def test_every_kind_of_attack_goes_through_views(tmp_path, attack):
    cells = cells_of("tte", attack, "bpda")
    positions, store = np.arange(12), Store(str(tmp_path))
    run_all(cells, positions, store, 12)
    found = verdicts(store, cells[0])
    assert (found["adv_margin"] < found["clean_margin"]).mean() > 0.5


def scored(scorers, attacks="clean,pgd,bert", against=("own", "template"), defenses="none"):
    return make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks(attacks, DEFAULTS),
        Protocol(eps=32 / 255),
        parse_defenses(defenses),
        parse_aims("bpda", 1),
        parse_scorers(scorers),
        against,
    )


def test_scorers_judge_and_are_attacked_or_not():
    cells = scored("template,cupl,wca:crops=3")
    assert [(c.scorer.name, c.attack_label) for c in cells] == [
        ("template", "clean"),
        ("template", "pgd-4_eps32"),
        ("template", "bert"),
        ("cupl", "clean"),
        ("cupl", "pgd-4_eps32"),
        ("cupl", "pgd-4_eps32_on-template"),
        ("cupl", "bert"),
        ("wca", "clean"),
        ("wca", "pgd-4_eps32"),
        ("wca", "pgd-4_eps32_on-template"),
        ("wca", "bert"),
    ]
    stops = [c.attack.stop for c in cells if c.attack.name == "pgd"]
    assert stops == ["first_success", "first_success", "final", "final", "final"]
    assert len({c.id for c in cells}) == len(cells)
    assert {c.id for c in cells[:3]} == {c.id for c in cells_of("none")}
    other_way_round = scored("template,cupl,wca:crops=3", against=("template", "own"))
    assert {c.id for c in other_way_round} == {c.id for c in cells}


@pytest.mark.ci
def test_examples_made_against_the_template_are_judged_by_the_others(tmp_path):
    scorers = "template,ensemble:templates=simple,cupl,wca:crops=4"
    cells = scored(scorers, "clean,pgd:steps=10,bert,sep,co-attack:steps=3")
    positions = np.arange(12)
    stores = [Store(str(tmp_path / name)) for name in "ab"]
    run_all(cells, positions, stores[0], 30)
    run_all(cells, positions[:6], stores[1], shard_size=4, batch_size=3)
    for cell in cells:
        a, b = (verdicts(s, cell) for s in stores)
        assert np.array_equal(a["adv_pred"][:6], b["adv_pred"]), (cell.scorer.name, cell.attack_label)
    rows = collect_rows(cells, {"digits": positions}, stores[0])
    found = {(r.who(), r.attack): r.top1 for r in rows}
    for scorer in ("cupl", "wca:crops=4", "ensemble:templates=simple"):
        clean, own, moved = (
            found[f"digits, {scorer}", a] for a in ("clean", "pgd-10_eps32", "pgd-10_eps32_on-template")
        )
        assert own < clean and moved < clean
        assert own <= moved or "wca" in scorer  # whose four fresh crops a query make a noisy target
    (table,) = result_grids(rows)
    assert "pgd-10 on-template 32/255" in table.header


def test_scorers_stand_behind_defences_too(tmp_path):
    cells = scored("wca:crops=3", "pgd", defenses="ttc+tte")
    run_all(cells, np.arange(6), Store(str(tmp_path)), 6)
    (own, moved) = collect_rows(cells, {"digits": np.arange(6)}, Store(str(tmp_path)))[:2]
    assert (own.attack, moved.attack) == ("pgd-4_eps32_bpda", "pgd-4_eps32_on-template_bpda")
    assert own.who() == "digits, wca:crops=3 + ttc+tte"


def test_a_folder_of_tables_is_one_for_every_data_set(tmp_path):
    """Scorer and attack take what bears the data set's name."""
    (tmp_path / "digits.csv").write_text(BUNDLED["digits"].read_text())
    cell, bundled = (
        scored(f"cupl:captions={place}", f"semantic:captions={place}")[0] for place in (tmp_path, "digits")
    )
    assert len(cell.scorer.texts) == 10 and len(cell.attack.texts[0]) == 5
    assert cell.id == bundled.id, "what is in a table counts, not where it lies"
    with pytest.raises(UserError, match="cifar10"):
        bind_captions(parse_scorers(f"cupl:captions={tmp_path}")[0], "cifar10", ("cat",))


def test_descriptions_have_to_be_there():
    with pytest.raises(UserError, match="cupl:captions="):
        bind_captions(parse_scorers("cupl")[0], "cifar10", ("cat",))
    with pytest.raises(UserError, match="sga"):
        scored("wca", "sga")

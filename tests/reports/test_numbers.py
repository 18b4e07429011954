"""From result files to numbers, held against plain loops over samples."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from rayclip.evaluation import wilson
from rayclip.reports.numbers import number_of, sections
from rayclip.reports.results import read_results
from rayclip.reports.section import AVERAGE, Number, average
from rayclip.reports.verdicts import Verdicts, align, paired
from rayclip.types import UserError
from reports.made import BERT, CLEAN, SEP, bits, describe, pgd, put


def only(root, *more):
    (section,) = sections(read_results([str(root), *map(str, more)]))
    return section


def attack(section, label):
    return next(a for a in section.attacks if a.label == label)


def subject(section, name):
    return next(s for s in section.subjects if s.name == name)


def test_a_number_is_what_the_shards_say(tmp_path):
    right = bits(1, 23)
    put(tmp_path, "m", pgd(), right, shard=5)
    section = only(tmp_path)
    number = section.number(section.subjects[0], "set", section.attacks[0])
    assert number.n == 23 and number.top1 == pytest.approx(100 * right.sum() / 23)
    assert (number.low, number.high) == pytest.approx(wilson(int(right.sum()), 23))


def test_wrong_before_the_attack_counts_as_wrong(tmp_path):
    from rayclip.store import Store

    cell = put(tmp_path, "m", pgd(), [True, True, True], shard=3)
    columns = {"position": [0, 1, 2], "label": [0, 1, 2], "clean_pred": [0, 0, 2], "adv_pred": [0, 1, 0]}
    Store(str(tmp_path)).write_table(f"cells/{cell}/00000000.parquet", columns)
    section = only(tmp_path)
    assert section.number(section.subjects[0], "set", section.attacks[0]).top1 == pytest.approx(100 / 3)


def test_a_sample_that_lies_in_two_shards_or_folders_counts_once(tmp_path):
    right = bits(2, 20)
    put(tmp_path / "a", "m", pgd(), right[:12], positions=range(12))
    put(tmp_path / "b", "m", pgd(), right[8:], positions=range(8, 20))
    section = only(tmp_path / "a", tmp_path / "b")
    number = section.number(section.subjects[0], "set", section.attacks[0])
    assert (number.n, number.top1) == (20, pytest.approx(100 * right.mean()))


def verdicts(positions, right):
    return Verdicts(positions_N=positions, right_N=right)


def test_shared_samples_of_different_sets():
    a, b = bits(3, 10), bits(4, 8)
    one, two = verdicts(np.arange(0, 20, 2), a), verdicts(np.arange(0, 24, 3), b)
    positions, (x, y) = align([one, two])
    assert positions.tolist() == [0, 6, 12, 18]
    assert x.tolist() == a[[0, 3, 6, 9]].tolist() and y.tolist() == b[[0, 2, 4, 6]].tolist()


def test_the_worst_case_is_taken_per_sample(tmp_path):
    right = {"pgd-10_eps1": bits(5), "bert": bits(6), "sep_pgd-10_eps1": bits(7)}
    for a in (pgd(), BERT, SEP):
        put(tmp_path, "m", a, right[a[0]])
    put(tmp_path, "m", CLEAN, np.ones(50, bool))
    section = only(tmp_path)
    survive = sum(all(r[i] for r in right.values()) for i in range(50))
    number = section.number(section.subjects[0], "set", attack(section, "worst"))
    assert number.top1 == pytest.approx(100 * survive / 50)
    assert number.top1 < min(100 * r.mean() for r in right.values())
    assert section.main.label == "worst"


def test_one_attack_has_no_worst_case(tmp_path):
    put(tmp_path, "m", CLEAN, bits(1))
    put(tmp_path, "m", pgd(), bits(2))
    assert [a.label for a in only(tmp_path).attacks] == ["clean", "pgd-10_eps1"]


def test_each_budget_has_its_own_worst_case(tmp_path):
    right = {1: bits(1), 4: bits(2)}
    put(tmp_path, "m", pgd("1/255"), right[1])
    put(tmp_path, "m", pgd("4/255"), right[4])
    put(tmp_path, "m", BERT, bits(3))
    section = only(tmp_path)
    for eps, mine in right.items():
        number = section.number(section.subjects[0], "set", attack(section, f"worst_eps{eps}"))
        assert number.top1 == pytest.approx(100 * (mine & bits(3)).mean())


def test_a_worst_case_over_fewer_attacks_is_marked(tmp_path):
    for model, attacks in (("a", (pgd(), BERT, SEP)), ("b", (pgd(), BERT))):
        for a in attacks:
            put(tmp_path, model, a, bits(1))
    section = only(tmp_path)
    found = {s.name: section.get(s, "set", section.main).partial for s in section.subjects}
    assert found == {"a": False, "b": True}


def test_a_worst_case_over_fewer_attacks_is_not_ranked_with_whole_ones(tmp_path):
    for dataset in ("one", "two"):
        for a in (pgd(), BERT, SEP):
            put(tmp_path, "whole", a, bits(1, p=0.5), dataset=dataset)
            put(tmp_path, "flattered", a, bits(2, p=0.9), dataset=dataset)
        put(tmp_path, "another", pgd(), bits(3, p=0.9), dataset=dataset)
        put(tmp_path, "another", BERT, bits(3, p=0.9), dataset=dataset)
    (tmp_path / "cells" / put(tmp_path, "flattered", SEP, bits(2), dataset="two") / "cell.json").unlink()
    section = only(tmp_path)
    whole, flattered, another = (subject(section, name) for name in ("whole", "flattered", "another"))
    assert [section.partial(s, "one", section.main) for s in (whole, flattered, another)] == [False, False, True]
    assert [section.partial(s, AVERAGE, section.main) for s in (whole, flattered, another)] == [False, True, True]
    assert section.number(another, AVERAGE, section.main).top1 > section.number(whole, AVERAGE, section.main).top1
    assert set(section.ranked("one", section.main)) == {whole, flattered}
    assert set(section.ranked(AVERAGE, section.main)) == {whole} and section.best() == whole


def test_where_all_worst_cases_are_partial_all_are_ranked(tmp_path):
    for model, attacks in (("a", (pgd(), BERT)), ("b", (pgd(), SEP))):
        for a in attacks:
            put(tmp_path, model, a, bits(1, p=0.5 + 0.4 * (model == "b")))
    section = only(tmp_path)
    assert len(section.ranked("set", section.main)) == 2 and section.best().name == "b"


def test_attacks_through_a_defence_count_in_its_worst_case(tmp_path):
    label, settings = pgd()
    through = (f"{label}_bpda", {**settings, "aim": "bpda"})
    for a, seed in ((pgd(), 1), (BERT, 2)):
        put(tmp_path, "m", a, bits(seed))
        put(tmp_path, "m", a, bits(seed), defense="ttc", aim="ignore")
    put(tmp_path, "m", through, bits(3), defense="ttc")
    section = only(tmp_path)
    plain, defended = (subject(section, name) for name in ("m", "m + ttc"))
    values = [section.get(s, "set", section.main) for s in (plain, defended)]
    assert [v.number.top1 for v in values] == pytest.approx(
        [100 * (bits(1) & bits(2)).mean(), 100 * (bits(1) & bits(2) & bits(3)).mean()]
    )
    assert not values[0].partial and not values[1].partial


def test_the_average_weighs_data_sets_alike_and_needs_all_of_them(tmp_path):
    put(tmp_path, "a", pgd(), [True] * 10, dataset="one")
    put(tmp_path, "a", pgd(), [False] * 1000, dataset="two")
    put(tmp_path, "b", pgd(), [True] * 10, dataset="one")
    section = only(tmp_path)
    assert section.columns == ["one", "two", AVERAGE]
    assert section.number(subject(section, "a"), AVERAGE, section.main).top1 == pytest.approx(50)
    assert section.number(subject(section, "b"), AVERAGE, section.main) is None


def test_the_averages_interval_adds_squared_distances():
    x, y = Number(top1=40, low=30, high=52, n=9), Number(top1=80, low=70, high=85, n=7)
    found = average([x, y])
    assert (found.top1, found.n) == (60, 16)
    assert found.low == pytest.approx(60 - math.sqrt(10**2 + 10**2) / 2)
    assert found.high == pytest.approx(60 + math.sqrt(12**2 + 5**2) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_is_the_binomial_test_of_the_discordant_samples(seed):
    a, b = bits(seed, 60, 0.7), bits(seed + 10, 60, 0.5)
    found = paired(verdicts(np.arange(60), a), verdicts(np.arange(60), b))
    first = sum(x and not y for x, y in zip(a, b, strict=True))
    second = sum(y and not x for x, y in zip(a, b, strict=True))
    assert (found.first, found.second, found.n) == (first, second, 60)
    assert found.p == pytest.approx(binomtest(int(first), int(first + second)).pvalue, rel=1e-9)
    assert found.difference == pytest.approx(100 * (a.mean() - b.mean()))


def test_an_interval_holds_its_number():
    for n in range(1, 300):
        for right in (0, n):
            number = number_of(right, n)
            assert number.low <= number.top1 <= number.high


def test_equal_models_do_not_differ_and_strangers_are_not_compared():
    same = verdicts(np.arange(9), bits(1, 9))
    assert paired(same, same).p == 1.0
    assert paired(same, verdicts(np.arange(20, 29), bits(2, 9))) is None
    half = paired(same, verdicts(np.arange(5, 12), np.ones(7, bool)))
    assert half.n == 4


def test_settings_that_all_attacks_share_split_the_results(tmp_path):
    put(tmp_path, "m", pgd(), bits(1))
    put(tmp_path, "m", pgd(), bits(2), resolution="model")
    found = sections(read_results([str(tmp_path)]))
    assert {s.shared["resolution"] for s in found} == {"native", "model"}


def test_attacks_of_one_label_are_told_apart_by_what_differs(tmp_path):
    put(tmp_path, "m", pgd(), bits(1))
    put(tmp_path, "m", pgd(stop="first_success"), bits(2))
    labels = [a.label for a in only(tmp_path).attacks]
    assert labels[:2] == ["pgd-10_eps1 stop final", "pgd-10_eps1 stop first_success"]


def test_models_are_named_by_label_then_folder_then_path(tmp_path):
    for model in ("local-dir:/a/x", "local-dir:/b/x", "local-dir:/a/y", "digits"):
        put(tmp_path, model, pgd(), bits(1))
    describe(tmp_path, "digits", label="untouched digits")
    names = {s.name for s in only(tmp_path).subjects}
    assert names == {"local-dir:/a/x", "local-dir:/b/x", "y", "untouched digits"}


def test_two_data_sets_of_one_name_are_kept_apart(tmp_path):
    from rayclip.store import Store

    put(tmp_path, "m", pgd(), bits(1))
    cell = put(tmp_path, "m", CLEAN, bits(2))
    store = Store(str(tmp_path))
    record = store.read_json(f"cells/{cell}/cell.json")
    store.write_json(f"cells/{cell}/cell.json", {**record, "data_fingerprint": "f" * 16})
    assert len(only(tmp_path).datasets) == 2


def test_parts_of_a_sweep_below_the_folder_are_found(tmp_path):
    put(tmp_path / "cifar10", "m", pgd(), bits(1), dataset="cifar10")
    put(tmp_path / "stl10", "m", pgd(), bits(2), dataset="stl10")
    assert only(tmp_path).datasets == ["cifar10", "stl10"]


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        read_results([str(tmp_path)])
    (tmp_path / "cells" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match="no verdicts yet"):
        read_results([str(tmp_path)])
    cell = put(tmp_path, "m", pgd(), bits(1))
    assert any("no cell.json" in note for note in read_results([str(tmp_path)]).notes)
    file = next((tmp_path / "cells" / cell).glob("*.parquet"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="damaged"):
        read_results([str(tmp_path)])
    file.write_bytes(whole)
    (tmp_path / "cells" / cell / "cell.json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged \(no model\)"):
        read_results([str(tmp_path)])
    (tmp_path / "cells" / cell / "cell.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_results([str(tmp_path)])


def test_the_order_of_a_printed_table_is_kept(tmp_path):
    for model in ("a", "b", "c"):
        put(tmp_path, model, pgd(), bits(1))
    (tmp_path / "results.json").write_text(json.dumps([{"model": "c"}, {"model": "a"}]))
    assert [s.name for s in only(tmp_path).subjects] == ["c", "a", "b"]

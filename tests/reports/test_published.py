"""Our numbers beside published ones: what matches, what differs and what is said of it."""

import csv
from importlib import resources

import pytest

from rayclip.reports.build import build
from rayclip.reports.formats import document_csv
from rayclip.reports.numbers import sections
from rayclip.reports.published import compare_with_published, papers, plain_dataset, read_paper
from rayclip.reports.results import read_results
from rayclip.types import UserError
from reports.made import BERT, CLEAN, bits, describe, pgd, put

VIT = "ViT-B-32:openai"
PAPER = {"class_names": "raw", "resolution": "native"}


def packaged(paper="mmcoa"):
    return (resources.files("rayclip.reports") / "published" / f"{paper}.csv").read_text()


def compared(root, *wanted):
    return compare_with_published(sections(read_results([str(root)])), wanted)


def row(part, dataset, attack):
    (grid,) = part.grids
    found = [[c.text for c in cells] for _, cells in grid.rows if (cells[0].text, cells[1].text) == (dataset, attack)]
    assert len(found) == 1
    return found[0]


def test_the_package_has_the_papers_606_numbers():
    rows = read_paper(packaged(), "mmcoa")
    assert papers() == ["mmcoa"] and len(rows) == 606
    assert {r.table for r in rows} == {"I", "II", "III", "IV", "V", "VI", "VII"}
    assert all(r.protocol for r in rows)


def test_they_are_those_that_were_handed_over(shared):
    ours = list(csv.reader(packaged().splitlines()))
    theirs = list(csv.reader((shared / "published" / "mmcoa.csv").read_text().splitlines()))
    assert [line[:9] for line in ours] == theirs


def test_a_number_of_the_papers_protocol_has_its_difference(tmp_path):
    right = [i % 4 == 0 for i in range(10_000)]
    put(tmp_path, VIT, CLEAN, right, dataset="cifar10", shard=10_000, **PAPER)
    put(tmp_path, VIT, pgd(steps=100), right, dataset="cifar10", shard=10_000, **PAPER)
    (part,) = compared(tmp_path, "mmcoa:I")
    assert row(part, "cifar10", "clean") == ["cifar10", "clean", "25.0", "88.56", "−63.6", ""]
    assert row(part, "cifar10", "pgd-100 1/255") == ["cifar10", "pgd-100 1/255", "25.0", "9.32", "+15.7", ""]
    assert "matches in 2 of 2" in part.grids[0].caption


def test_what_differs_is_said_and_no_difference_is_given(tmp_path):
    put(tmp_path, VIT, pgd(), bits(1), dataset="cifar10-test", class_names="curated")
    (part,) = compared(tmp_path, "mmcoa:I")
    assert row(part, "cifar10", "pgd-10 1/255")[4:] == ["", "1 2 3"]
    assert "1: steps 10, theirs 100. 2: " in part.grids[0].caption
    for text in ("steps 10, theirs 100", "class names curated, theirs raw", "50 of the 10,000 images of cifar10"):
        assert text in part.grids[0].caption
    assert "norm" not in part.grids[0].caption and "model" not in part.grids[0].caption


def test_csv_has_the_published_numbers_too(tmp_path):
    right = [i % 4 == 0 for i in range(10_000)]
    put(tmp_path, VIT, CLEAN, right, dataset="cifar10", shard=10_000, **PAPER)
    put(tmp_path, VIT, pgd(), right, dataset="cifar10", shard=10_000, **PAPER)
    document = build(read_results([str(tmp_path)]), against=["mmcoa:I"])
    lines = [line for line in csv.DictReader(document_csv(document).splitlines()) if line["beside"]]
    clean, attacked = sorted(lines, key=lambda line: line["attack"])
    assert (clean["beside"], clean["dataset"], float(clean["theirs"])) == ("mmcoa:I", "cifar10", 88.56)
    assert float(clean["difference"]) == pytest.approx(25 - 88.56) and clean["differs"] == ""
    assert attacked["difference"] == "" and attacked["differs"] == "steps 10, theirs 100"


def test_of_several_attacks_the_one_most_like_the_papers_is_taken(tmp_path):
    for a in (pgd(), pgd(steps=100), pgd("4/255", steps=100)):
        put(tmp_path, VIT, a, bits(1), dataset="cifar10", **PAPER)
    (part,) = compared(tmp_path, "mmcoa:I")
    assert [cells[1].text for _, cells in part.grids[0].rows] == ["pgd-100 1/255"]


def test_a_fine_tuned_model_is_compared_with_its_method_data_and_shots(tmp_path):
    put(tmp_path, "local-dir:/x", CLEAN, bits(1), dataset="cifar10", **PAPER)
    describe(tmp_path, "local-dir:/x", method="mmcoa", data="imagenet", base=VIT, shots=5)
    (part,) = compared(tmp_path, "mmcoa:III")
    theirs = next(
        r.value
        for r in read_paper(packaged(), "mmcoa")
        if (r.table, r.method, r.shots, r.dataset) == ("III", "MMCoA", "5", "cifar10")
    )
    assert row(part, "cifar10", "clean")[3] == f"{theirs:.2f}"
    assert not compared(tmp_path, "mmcoa:I")[0].grids  # its MMCoA was trained on CIFAR10


def test_an_ablation_is_not_the_method(tmp_path):
    from rayclip.store import Store

    put(tmp_path, "m", CLEAN, bits(1), dataset="cifar10", **PAPER)
    describe(tmp_path, "m", method="mmcoa", data="cifar10", base=VIT)
    assert len(compared(tmp_path, "mmcoa:IV")[0].grids[0].rows) == 1
    store, (name,) = Store(str(tmp_path)), [f"lineage/{p.name}" for p in (tmp_path / "lineage").iterdir()]
    record = store.read_json(name)
    record["lineage"]["config"]["method"]["lambda_txt"] = 0
    store.write_json(name, record)
    assert not compared(tmp_path, "mmcoa:I")[0].grids
    (part,) = compared(tmp_path, "mmcoa:IV")
    ablation = [r for r in read_paper(packaged(), "mmcoa") if r.method == "MMCoA (image loss only)"]
    theirs = next(r.value for r in ablation if (r.dataset, r.attack) == ("cifar10", "clean"))
    assert row(part, "cifar10", "clean")[3] == f"{theirs:.2f}"


def test_the_average_needs_the_papers_fifteen(tmp_path):
    rows = read_paper(packaged(), "mmcoa")
    average = next(r for r in rows if (r.table, r.dataset, r.method) == ("III", "average", "CLIP"))
    assert len(average.datasets) == 15
    values = {name: i % 3 for i, name in enumerate(average.datasets)}
    for name, value in list(values.items())[:-1]:
        put(tmp_path, VIT, CLEAN, [i % 3 < value for i in range(6)], dataset=name, **PAPER)
    (part,) = compared(tmp_path, "mmcoa:III")
    assert "average" not in {cells[0].text for _, cells in part.grids[0].rows}
    last = average.datasets[-1]
    put(tmp_path, VIT, CLEAN, [i % 3 < values[last] for i in range(6)], dataset=last, **PAPER)
    put(tmp_path, VIT, CLEAN, [True] * 6, dataset="pcam", **PAPER)  # not among the fifteen
    (part,) = compared(tmp_path, "mmcoa:III")
    ours = sum(100 * v / 3 for v in values.values()) / 15
    assert row(part, "average", "clean")[2:4] == [f"{ours:.1f}", "63.05"]


def test_nothing_in_common_is_a_sentence(tmp_path):
    put(tmp_path, "digits", BERT, bits(1), dataset="digits")
    (part,) = compared(tmp_path, "mmcoa:II")
    assert not part.grids and "these results about digits" in part.text[0]
    assert len(compared(tmp_path, "mmcoa")) == 7


@pytest.mark.parametrize(
    ("wanted", "sentence"), [("nobody:I", "only mmcoa"), ("mmcoa:XL", "no table XL"), ("", "no paper")]
)
def test_unknown_papers_and_tables_are_refused(tmp_path, wanted, sentence):
    put(tmp_path, "digits", BERT, bits(1))
    with pytest.raises(UserError, match=sentence):
        compared(tmp_path, wanted)


def test_a_papers_file_is_checked():
    head = "paper,table,method,train_dataset,shots,attack,dataset,metric,value\n"
    (row,) = read_paper(head + "x,I,CLIP,none,none,clean,cifar10,top1,1.5\n", "x")
    assert (row.value, row.protocol, row.datasets) == (1.5, {}, ("cifar10",))
    with pytest.raises(UserError, match="lack the column value"):
        read_paper(head.replace(",value", ""), "x")
    with pytest.raises(UserError, match="line 2"):
        read_paper(head + "x,I,CLIP,none,none,clean,cifar10,top1,many\n", "x")


def test_names_of_data_sets_lose_split_and_part():
    names = ("cifar10", "cifar10-test", "/data/cifar10-test.parquet", "cifar10#holdout", "cifar10_val")
    assert {plain_dataset(name) for name in names} == {"cifar10"}
    assert plain_dataset("tiny_imagenet") == "tiny_imagenet"

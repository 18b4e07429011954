"""Our numbers beside published ones: what matches, what differs and what is said of it."""

import csv
from importlib import resources

import pytest

from rayclip.paths import plain_dataset
from rayclip.reports.beside import compare_with_published
from rayclip.reports.build import build
from rayclip.reports.formats import document_csv
from rayclip.reports.numbers import sections
from rayclip.reports.published import numbers_of, papers, read_paper, sources
from rayclip.reports.results import read_results
from rayclip.types import UserError
from reports.made import BERT, CLEAN, bits, describe, fingerprint, pgd, put

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


HANDED_OVER = ["bap", "cola", "doc", "fare", "lore", "mmcoa", "nac", "tecoa", "tgazsr", "tvss"]


def test_the_package_has_every_number_that_was_handed_over(shared):
    assert papers() == HANDED_OVER == sorted(sources())
    known = set()
    for paper in papers():
        ours = list(csv.DictReader(packaged(paper).splitlines()))
        theirs = list(csv.DictReader((shared / "published" / f"{paper}.csv").read_text().splitlines()))
        columns = list(theirs[0])[:9] if paper == "mmcoa" else list(theirs[0])[:10]
        assert [[line[c] for c in columns] for line in ours] == [[line[c] for c in columns] for line in theirs]
        known |= {tuple(line[c] for c in columns) for line in theirs}
        assert all(row.protocol for row in numbers_of(paper))
    assert sum(len(numbers_of(paper)) for paper in papers()) == 3_140
    again = csv.DictReader((shared / "published" / "ttc.csv").read_text().splitlines())  # a view of the others
    assert {tuple(list(line.values())[:10]) for line in again} <= known


def test_averages_that_are_not_their_cells_mean_are_marked():
    """Each printed average is the mean of its cells within rounding, or doubtful."""
    rows = [row for paper in papers() for row in numbers_of(paper) if row.metric == "top1"]
    settings = [tuple(sorted((k, v) for k, v in row.protocol.items() if k != "datasets")) for row in rows]
    found = {
        (r.place, r.method, r.train_dataset, r.shots, r.dataset, s): r for r, s in zip(rows, settings, strict=True)
    }
    checked = 0
    for (place, *who, dataset, protocol), row in found.items():
        cells = [found.get((place, *who, name, protocol)) for name in row.datasets]
        if dataset == "average" and "datasets" in row.protocol and None not in cells:
            mean = sum(cell.value for cell in cells) / len(cells)
            checked += 1
            assert abs(mean - row.value) <= 0.12 or row.doubt, (place, who, protocol, mean)
    assert checked > 150


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
    for same in ("ViT-B-32-quickgelu:openai", "hf:openai/clip-vit-base-patch32"):
        put(tmp_path / same[:2], same, pgd(), bits(1), dataset="cifar10-test", class_names="curated")
        assert compared(tmp_path / same[:2], "mmcoa:I")[0].grids[0].caption == part.grids[0].caption


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
    ("wanted", "sentence"), [("nobody:I", "no paper"), ("mmcoa:XL", "no table XL"), ("", "no paper")]
)
def test_unknown_papers_and_tables_are_refused(tmp_path, wanted, sentence):
    put(tmp_path, "digits", BERT, bits(1))
    with pytest.raises(UserError, match=sentence):
        compared(tmp_path, wanted)


def test_a_papers_file_is_checked():
    head = "paper,table,method,train_dataset,shots,attack,dataset,metric,value\n"
    (row,) = read_paper(head + "x,I,CLIP,none,none,clean,cifar10,top1,1.5\n", "x")
    assert (row.value, row.protocol, row.datasets, row.doubt) == (1.5, {}, ("cifar10",), "")
    with pytest.raises(UserError, match="lack the column value"):
        read_paper(head.replace(",value", ""), "x")
    with pytest.raises(UserError, match="line 2"):
        read_paper(head + "x,I,CLIP,none,none,clean,cifar10,top1,many\n", "x")


def test_names_of_data_sets_lose_split_and_part():
    names = ("cifar10", "cifar10-test", "/data/cifar10-test.parquet", "cifar10#holdout", "cifar10_val")
    assert {plain_dataset(name) for name in names} == {"cifar10"}
    assert plain_dataset("tiny_imagenet") == "tiny_imagenet"


TTC = "ttc"


def test_defended_rows_match_the_defence_and_how_it_was_attacked(tmp_path):
    right = [i % 4 == 0 for i in range(10_000)]
    at = {"dataset": "cifar10", "shard": 10_000, **PAPER}
    attack = pgd("4/255")
    put(tmp_path, VIT, attack, right, **at)
    assert {cells[3].text for _, cells in compared(tmp_path, "doc:1")[0].grids[0].rows} == {"0.00"}, "undefended CLIP"
    put(tmp_path, VIT, attack, right, defense=TTC, **at)
    put(tmp_path, VIT, (f"{attack[0]}_bpda", attack[1]), right, defense=TTC, aim="bpda", **at)
    image = [n for n in numbers_of("doc") if (n.table, n.dataset, n.attack) == ("1", "cifar10", "image")]
    theirs = {n.method: n.value for n in image}
    found = dict(compared(tmp_path, "doc:1")[0].grids[0].rows)
    assert set(found) == {VIT, f"{VIT} + ttc"}
    assert (found[f"{VIT} + ttc"][3].value, found[f"{VIT} + ttc"][5].text) == (theirs["TTC"], "")
    other = tmp_path / "other"
    put(other, VIT, (f"{attack[0]}_bpda", attack[1]), right, defense="ttc:tau=0.1", aim="bpda", **at)
    (part,) = compared(other, "doc:1")
    assert len(part.grids[0].rows) == 1 and part.grids[0].rows[0][1][5].text == "1 2"
    assert "defence with tau=0.1" in part.grids[0].caption and "through the defence" in part.grids[0].caption
    put(other, VIT, attack, right, defense="ttc+rn", **at)
    assert len(compared(other, "doc:1")[0].grids[0].rows) == 1, "a chain is no single defence"


def test_a_defence_is_the_same_however_its_name_is_hyphenated(tmp_path):
    put(tmp_path, "ViT-B-16:openai", pgd(), bits(1), dataset="cifar10", defense="rtpt")
    assert {cells[0].text for _, cells in compared(tmp_path, "bap:2")[0].grids[0].rows} == {"cifar10"}


def test_training_budgets_and_architectures_count(tmp_path):
    from rayclip.models.checkpoint import model_record
    from rayclip.store import Store

    theirs = {
        (r.protocol["train_eps"], r.protocol["model"]): r.value
        for r in numbers_of("fare")
        if (r.table, r.method, r.attack, r.dataset) == ("4", "FARE", "clean", "cifar10")
    }
    for spec in ("zoo:fare2-vit-l-14", "zoo:fare4-vit-l-14", "zoo:fare4-vit-b-16-laion2b"):
        put(tmp_path, spec, CLEAN, [True] * 10_000, dataset="cifar10", shard=10_000, scorer="ensemble:templates=clip")
        Store(str(tmp_path)).write_json(f"lineage/{fingerprint(spec)}.json", model_record(spec))

    def beside():
        (part,) = compared(tmp_path, "fare:4")
        return {name.removesuffix(", ensemble:templates=clip"): cells for name, cells in part.grids[0].rows}

    found = beside()
    assert found["zoo:fare2-vit-l-14"][3].value == theirs["2/255", "ViT-L-14:openai"]
    assert found["zoo:fare4-vit-l-14"][3].value == theirs["4/255", "ViT-L-14:openai"]
    assert {found[f"zoo:fare{eps}-vit-l-14"][5].text for eps in (2, 4)} == {""}
    assert found["zoo:fare4-vit-b-16-laion2b"][5].text == "1", "another architecture: said, and no difference"
    describe(tmp_path, "zoo:fare4-vit-l-14", method="fare", data="imagenet", base="ViT-L-14-quickgelu:openai")
    assert "zoo:fare4-vit-l-14" not in beside(), "its budget is not known"
    put(tmp_path, "zoo:fare2-vit-l-14", CLEAN, [True] * 10_000, dataset="cifar10", shard=10_000)
    assert "scorer template, theirs ensemble:templates=clip" in compared(tmp_path, "fare:4")[0].grids[0].caption


def test_a_method_stands_as_all_papers_measured_it(tmp_path):
    right = [i % 4 == 0 for i in range(10_000)]
    put(tmp_path, VIT, pgd("4/255"), right, dataset="cifar10", shard=10_000, defense=TTC, **PAPER)
    (part,) = compared(tmp_path, TTC)
    (grid,) = part.grids
    assert {place.partition(":")[0] for place in grid.header[4:]} == {"bap", "cola", "doc", "nac", "tvss"}
    numbers = [n for paper in papers() for n in numbers_of(paper) if n.method == "TTC"]
    shown = [cell.value for _, cells in grid.rows for cell in cells[3:] if cell.text]
    assert sorted(shown) == sorted(n.value for n in numbers) and len(numbers) == 169
    ours = [(name, cells[1].text, cells[2].text) for name, cells in grid.rows if cells[2].text]
    assert ours == [("cifar10", "pgd steps 10 4/255", "25.0")] and "doubtful" in grid.caption
    for name, cells in grid.rows:
        for place, cell in zip(grid.header[4:], cells[3:], strict=True):
            assert not cell.text or any((n.place, n.dataset, n.value) == (place, name, cell.value) for n in numbers)


def test_all_lists_every_number_with_its_difference_or_the_reason(tmp_path):
    right = [i % 4 == 0 for i in range(10_000)]
    at = {"dataset": "cifar10", "shard": 10_000, **PAPER}
    put(tmp_path, VIT, CLEAN, right, **at)
    put(tmp_path, VIT, pgd("4/255"), right, **at)
    put(tmp_path, VIT, pgd("4/255"), right, defense=TTC, **at)
    alike, others = compared(tmp_path, "all")
    matched, left = alike.grids[0].rows, others.grids[0].rows
    total = sum(len(numbers_of(paper)) for paper in papers())
    assert len(matched) + sum(cells[3].value for _, cells in left) == total
    assert all(cells[4].text and len(cells[2].text.split(", ")) == cells[3].value for _, cells in left)
    assert {"doc:1"} <= {cells[5].text for _, cells in matched} and len(alike.lines) == len(matched)
    assert any(place.startswith("mmcoa") and "no results on" in cells[4].text for place, cells in left)
    reasons = {cells[4].text for _, cells in left if "cifar10" in cells[2].text.split(", ")}
    assert {"no such model here", "not evaluated under this attack"} <= reasons
    assert any("eps 4/255, theirs 1/255" in reason for reason in reasons)

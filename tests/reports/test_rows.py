import io
from dataclasses import replace

import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from rayclip.evaluation.examples import pngs
from rayclip.reports.examples import example_grid
from rayclip.reports.grid import Cell, Grid
from rayclip.reports.rows import markdown_tables, result_grids
from rayclip.reports.to_terminal import grid_group
from rayclip.types import Row

PROTOCOL = {
    "attack": "pgd",
    "eps": "32/255",
    "steps": 10,
    "step": "8/255",
    "norm": "linf",
    "stop": "first_success",
    "template": "a {}",
    "resolution": "native",
    "precision": "fp32",
    "seed": 0,
}


def row(model, attack, top1, dataset="digits"):
    return Row(
        model=model,
        dataset=dataset,
        attack=attack,
        eps=None,
        steps=None,
        n=445,
        top1=top1,
        ci_low=top1 - 3,
        ci_high=min(100.0, top1 + 3),
        protocol=PROTOCOL | ({"worst_of": list(ATTACKS[:-1])} if attack == "worst" else {"attack": attack}),
        cell="x",
    )


def texts(table):
    return [(name, *(f"{cell.text} {cell.note}".strip() for cell in cells)) for name, cells in table.rows]


ATTACKS = ("clean", "pgd-10_eps32", "bert", "sep_pgd-10_eps32", "worst")


def test_a_row_a_model_a_column_an_attack():
    rows = [row(m, a, 10.0 * i + j) for i, m in enumerate(("base", "local-dir:/x")) for j, a in enumerate(ATTACKS)]
    (table,) = result_grids(rows, {"local-dir:/x": "mmcoa full"})
    assert table.header == ("model", "clean", "pgd-10 32/255", "bert", "sep pgd-10 32/255", "worst case")
    assert texts(table)[1] == ("mmcoa full", "10.0 7–13", "11.0 8–14", "12.0 9–15", "13.0 10–16", "14.0 11–17")
    assert "n = 445" in table.caption and "step 8/255" in table.caption and "'a {}'" in table.caption
    lines = markdown_tables(rows, {"local-dir:/x": "mmcoa full"}).splitlines()
    assert lines[2].count("|") == lines[4].count("|") == 7


def test_five_attacks_fit_eighty_columns():
    rows = [row("untouched digits", a, 100.0) for a in ATTACKS]
    out = io.StringIO()
    Console(file=out, width=80).print(grid_group(result_grids(rows)[0]))
    assert "untouched digits" in out.getvalue() and "100 97–100" in out.getvalue() and "…" not in out.getvalue()


@pytest.mark.parametrize("width", [80, 60, 120])
def test_a_wide_table_goes_on_below_with_the_names_again_and_no_number_cut(width):
    names = ("untouched digits", "mmcoa 20-shot epoch 3 + ttc", "short")
    attacks = [f"{name}_eps{eps}" for eps in (8, 16, 32) for name in ("pgd-10", "sep_pgd-10", "cw-100")]
    table = result_grids([row(m, a, 100.0) for m in names for a in ("clean", *attacks, "worst")])[0]
    out = io.StringIO()
    Console(file=out, width=width).print(grid_group(table, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    assert out.getvalue().count("100 97–100") == 3 * 11
    blocks = out.getvalue().split("(continued)")
    assert len(blocks) > 1 and all(block.count("short") == block.count("untouched") == 1 for block in blocks)
    assert out.getvalue().count("seed 0") == 1


def test_a_row_without_numbers_in_a_part_of_a_table_is_not_in_that_part():
    rows = [("one", [Cell(text="1"), Cell()]), ("two", [Cell(text="2"), Cell(text="2")])]
    table = Grid(title="t", header=("model", "a" * 40, "b" * 40), rows=rows)
    out = io.StringIO()
    Console(file=out, width=80).print(grid_group(table))
    first, second = out.getvalue().split("(continued)")
    assert "one" in first and "two" in first and "two" in second and "one" not in second


def test_several_data_sets_end_in_an_average():
    rows = [row("m", a, v, d) for d, v in (("cifar10", 40.0), ("stl10", 60.0)) for a in ("clean", "worst")]
    tables = result_grids(rows)
    assert [t.title.split(":")[0] for t in tables] == ["cifar10", "stl10", "average over 2 data sets"]
    assert [text.split()[0] for text in texts(tables[-1])[0]] == ["m", "50.0", "50.0"]


def test_numbers_of_different_prompts_are_never_in_one_table():
    one = [row("m", a, 40.0) for a in ("clean", "bert")]
    two = [replace(r, top1=60.0, protocol=r.protocol | {"template": "the {}"}) for r in one]
    tables = result_grids([*one, *two])
    assert [texts(table)[0][1].split()[0] for table in tables] == ["40.0", "60.0"]
    assert [("'a {}'" in t.caption, "'the {}'" in t.caption) for t in tables] == [(True, False), (False, True)]


def test_the_grid_shows_images_in_three_rows():
    import torch

    red, green = (torch.zeros(2, 3, 8, 8) for _ in range(2))
    red[:, 0], green[:, 1] = 1, 1
    examples = pa.table(
        {
            "label": [0, 1],
            "clean_pred": [0, 1],
            "adv_pred": [1, 1],
            "clean": pngs(red),
            "difference": pngs(red * 0 + 0.5),
            "adversarial": pngs(green),
        }
    )
    image = Image.open(io.BytesIO(example_grid(examples, ["cat", "dog"], "title"))).convert("RGB")
    colours = {c for _, c in image.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 255, 0), (128, 128, 128)} <= colours

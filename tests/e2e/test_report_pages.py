"""The HTML report and the leaderboard in headless Chromium: open, sort, filter, compare, in light and dark, with no
console message and no fault that axe-core calls serious."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from calling import run_here
from e2e.test_commands import run
from rayclip.models import load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.reports.notes import heading
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from reports.made import BERT, CLEAN, SEP, bits, describe, pgd, put

pytestmark = pytest.mark.e2e
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def rayclip(*args):
    return run_here(".", *args).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A real evaluation of the bundled model, made-up results of more models, and the pages of both."""
    root = tmp_path_factory.mktemp("pages")
    os.environ["OMP_NUM_THREADS"] = "1"
    rayclip(
        *(
            "eval",
            "--model",
            "digits",
            "--data",
            "digits",
            "--attacks",
            "clean,pgd:steps=3,bert,sep:steps=3",
            "--quiet",
        ),
        *("--eps", "32/255", "--limit", "60", "--no-tracking", "--local", "--out", root / "real"),
    )
    for m in range(5):
        model, method = f"local-dir:/m{m}", ("tecoa", "mmcoa")[m % 2]
        for d, dataset in enumerate(("one", "two")):
            for a, attack in enumerate((CLEAN, pgd(), BERT, SEP)):
                right = bits(10 * m + 3 * d + a, n=80, p=0.3 + 0.1 * m)
                put(root / "made", model, attack, right, dataset=dataset)
                if m == 4:
                    put(root / "made", model, attack, right | bits(99, n=80), dataset=dataset, defense="ttc")
        describe(root / "made", model, label=f"{method} {m}", method=method, shots=(1, 5, None)[m // 2])
    for name in ("real", "made"):
        rayclip("report", root / name, "--out", root / f"{name}.html")
        rayclip("leaderboard", root / name, "--out", root / f"{name}-board")
    return root


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def visit(request, chromium):
    """Open a file as a page; what it asks of the network or says on the console fails the test."""
    # axe-core is injected as a script, which the pages' own policy allows inline only
    context = chromium.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if not re.match("file:|data:", asked.url) else None)

    def open_page(path: Path):
        page.goto(path.as_uri())
        return page

    yield open_page
    assert wrong == []
    context.close()


LIGHT = pytest.mark.parametrize("visit", ["light"], indirect=True)  # what it does is no matter of colours


def faults(page):
    """What axe-core finds serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]


def column(page, table, index):
    """The texts of a column's cells that are shown."""
    cells = page.locator(f"{table} tbody tr:visible > :nth-child({index})").all()
    return [cell.inner_text().strip() for cell in cells]


@pytest.mark.parametrize("name", ["real.html", "made.html", "real-board/index.html", "made-board/index.html"])
def test_every_page_opens_without_a_fault(made, visit, name):
    page = visit(made / name)
    assert page.locator("main table").count() >= 1
    assert faults(page) == []
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert faults(page) == []
    assert page.locator(".scroll[data-cut]").count() > 0, "a table that is wider than the page says so"
    panels = page.locator("figure .narrow")
    assert panels.count() == 0 or (panels.first.is_visible() and page.locator("figure .across").first.is_hidden())


def test_light_and_dark_differ_in_their_figures_too(made, chromium):
    colours = {}
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto((made / "made.html").as_uri())
        series = page.locator("figure svg path[style*='--c1']").first
        colours[scheme] = [page.evaluate("getComputedStyle(document.body).backgroundColor")] + [
            series.evaluate(f"e => getComputedStyle(e).{what}") for what in ("fill", "stroke")
        ]
        page.close()
    assert all(a != b or a == "none" for a, b in zip(colours["light"], colours["dark"], strict=True))
    assert colours["light"][0] != colours["dark"][0]


@LIGHT
def test_a_report_sorts_by_keyboard_and_says_so(made, visit):
    page = visit(made / "made.html")
    table = "main table >> nth=0"
    head = page.locator(f"{table} >> thead th").nth(1)
    names = page.locator(f"{table} >> tbody th").all_inner_texts()
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    values = [
        float(v)
        for v in page.locator(f"{table} >> tbody tr").evaluate_all("rows => rows.map(r => r.cells[1].dataset.value)")
    ]
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "ascending"
    values = [
        float(v)
        for v in page.locator(f"{table} >> tbody tr").evaluate_all("rows => rows.map(r => r.cells[1].dataset.value)")
    ]
    assert values == sorted(values)
    first = page.locator(f"{table} >> thead th").nth(0)
    first.locator("button").click()
    assert head.get_attribute("aria-sort") == "none" and first.get_attribute("aria-sort") == "ascending"
    assert page.locator(f"{table} >> tbody th").all_inner_texts() == sorted(names)


@LIGHT
def test_a_report_filters_all_its_tables(made, visit):
    page = visit(made / "made.html")
    everybody = page.locator("#count").inner_text()
    page.get_by_label("Filter models").fill("mmcoa")
    assert page.locator("#count").inner_text() == "2 of 6 models shown" and everybody == "6 of 6 models shown"
    shown = page.locator("table[data-rows] tbody tr:visible th").all_inner_texts()
    assert set(shown) == {"mmcoa 1", "mmcoa 3"}
    page.get_by_label("Filter models").fill("")
    assert page.locator("#count").inner_text() == everybody


@LIGHT
def test_two_models_are_compared_as_the_package_compares_them(made, visit):
    page = visit(made / "made.html")
    page.get_by_label("First model").select_option(label="tecoa 2")
    page.get_by_label("Second model").select_option(label="mmcoa 3")
    (section,) = sections(read_results([str(made / "made")]))
    one, two = (next(s for s in section.subjects if s.name == name) for name in ("tecoa 2", "mmcoa 3"))
    rows = page.locator("[aria-labelledby=compared-0] tbody tr").all()
    assert len(rows) == len(section.datasets) * len(section.attacks)
    for row in rows:
        dataset, label, difference, first, second, n, p = row.locator("th, td").all_inner_texts()
        attack = next(a for a in section.attacks if heading(a.label) == label)
        found = section.compare(one, two, dataset, attack)
        assert (int(first), int(second), int(n)) == (found.first, found.second, found.n)
        assert float(difference.replace("−", "-")) == pytest.approx(found.difference, abs=0.0501)
        assert p == ("< 0.001" if found.p < 0.001 else f"{found.p:.3f}")
    page.get_by_label("First model").select_option(label="mmcoa 3")
    assert page.get_by_text("Choose two different models.").is_visible()
    assert page.locator("[aria-labelledby=compared-0] tbody tr").count() == 0


@LIGHT
def test_the_leaderboard_filters_by_threat_defence_and_data_set(made, visit):
    page = visit(made / "made-board" / "index.html")
    ranks = column(page, "table", 1)
    assert ranks == [str(i + 1) for i in range(6)] and set(column(page, "table", 13)) == {"l∞ 1/255, all attacks"}
    assert set(column(page, "table", 14)) == {"average"}
    said = page.locator("#shared").inner_text()
    assert "data set average" in said and "threat model l∞ 1/255, all attacks" in said and "trained on" not in said
    assert page.get_by_role("columnheader", name="data set").count() == 0, "what all rows share is said once"
    page.get_by_label("Defence").select_option("ttc")
    assert column(page, "table", 5) == column(page, "table", 4) and column(page, "table", 6) == [""], "nobody looked"
    assert column(page, "table", 2) == ["tecoa 4 + ttc"] and column(page, "table", 1) == ["1"]
    assert page.get_by_role("status").inner_text().startswith("1 of ")
    page.get_by_label("Defence").select_option("none")
    page.get_by_label("Threat model").select_option("texts")
    page.get_by_label("Data set").select_option("two")
    assert len(column(page, "table", 2)) == 5 and set(column(page, "table", 14)) == {"two"}
    page.get_by_label("Find a model").fill("mmcoa")
    assert sorted(column(page, "table", 2)) == ["mmcoa 1", "mmcoa 3"]
    page.get_by_role("button", name="robust").click()
    robust = [float(text.split()[0].rstrip("†")) for text in column(page, "table", 4)]
    assert robust == sorted(robust, reverse=True) and column(page, "table", 1) == ["1", "2"]


@LIGHT
def test_filters_follow_one_another_to_where_there_are_rows(made, tmp_path, visit):
    """Two folders that share neither data nor budgets: no model has an average, and not every choice has rows."""
    for model, dataset, budgets in (("a", "one", ("1/255",)), ("b", "two", ("4/255", "8/255"))):
        for attack in (CLEAN, *map(pgd, budgets)):
            put(tmp_path / "results", model, attack, bits(1), dataset=dataset)
    rayclip("leaderboard", tmp_path / "results", "--out", tmp_path / "board")
    page = visit(tmp_path / "board" / "index.html")
    threat, dataset = page.get_by_label("Threat model"), page.get_by_label("Data set")
    assert column(page, "table", 2) == ["a"] and (threat.input_value(), dataset.input_value()) == (
        "l∞ 1/255, images",
        "one",
    )
    threat.select_option("l∞ 8/255, images")
    assert column(page, "table", 2) == ["b"] and dataset.input_value() == "two"
    dataset.select_option("one")
    assert column(page, "table", 2) == ["a"] and threat.input_value() == "l∞ 1/255, images"


def test_a_page_in_the_dark_prints_light_and_without_controls(made, visit):
    for name in ("made.html", "made-board/index.html"):
        page = visit(made / name)
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator(".controls").first.is_hidden() and page.locator("main table").first.is_visible()


def test_the_leaderboard_reads_without_script(made, chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((made / "made-board" / "index.html").as_uri())
    assert page.locator("tbody tr:visible").count() > 6 * 3
    context.close()


def test_an_external_checkpoint_joins_with_one_command(made, chromium):
    clip = load_model("digits")
    with torch.no_grad():
        clip.model.visual.proj.mul_(torch.linspace(0.5, 1.5, clip.model.visual.proj.shape[1]))
    save_checkpoint(clip, made / "guest", {})
    board = ("leaderboard", made / "real", "--out", made / "real-board", "--quiet")
    # In a process of its own: Ray and a browser that this one drives do not go together
    run(made, *board, "--add", f"local-dir:{made / 'guest'}")
    assert not (made / "real" / "results").exists()
    page = chromium.new_page()
    page.goto((made / "real-board" / "index.html").as_uri())
    assert sorted(column(page, "table", 2)) == ["digits", "guest"]
    assert set(column(page, "table", 5)) == {"60"} and "†" not in page.locator("tbody").inner_text()
    rayclip(*board)  # what has joined stays
    page.reload()
    assert sorted(column(page, "table", 2)) == ["digits", "guest"]
    page.close()

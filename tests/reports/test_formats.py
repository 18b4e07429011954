"""A report as Markdown, LaTeX, CSV and HTML."""

import csv
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources

import jsonschema
import pytest

from rayclip.reports import make_leaderboard, make_report
from rayclip.reports.build import build
from rayclip.reports.formats import document_csv, document_latex, document_markdown
from rayclip.reports.grid import Cell, Document, Grid, Part
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from rayclip.reports.rows import markdown_tables
from rayclip.store import Store
from rayclip.types import Row, UserError
from reports.made import BERT, CLEAN, SEP, bits, describe, fingerprint, pgd, put

WORDS = Part(
    title="Words",
    grids=(
        Grid(
            title="w",
            header=("model", "about", "value"),
            rows=(("m", (Cell(text="x"), Cell(text="1", value=1))),),
        ),
    ),
)
NASTY = "a_b & <script>alert(1)</script> 100% #1 | $x^2$ \\ {é} 模型"


@pytest.fixture
def results(tmp_path):
    """Three models on two data sets under four attacks."""
    strength = {"untouched": 0.2, NASTY: 0.5, "best": 0.9}
    for m, (model, p) in enumerate(strength.items()):
        for d, dataset in enumerate(("one", "two")):
            put(tmp_path, model, CLEAN, bits(90 + m, p=0.95), dataset=dataset)
            for a, attack in enumerate((pgd(), BERT, SEP)):
                put(tmp_path, model, attack, bits(10 * m + 3 * d + a, p=p), dataset=dataset)
    describe(tmp_path, "best", method="mmcoa", shots=5)
    return read_results([str(tmp_path)])


def test_csv_holds_every_number_once(results):
    lines = list(csv.DictReader(io.StringIO(document_csv(build(results)))))
    (section,) = sections(results)
    found = {(line["model"], line["dataset"], line["attack"]): line for line in lines}
    assert len(found) == len(lines) == 3 * 3 * 5
    for subject in section.subjects:
        for dataset in section.columns:
            for attack in section.attacks:
                line, number = found[subject.name, dataset, attack.label], section.number(subject, dataset, attack)
                values = [float(line[k]) for k in ("top1", "ci_low", "ci_high")]
                assert values == pytest.approx([number.top1, number.low, number.high], abs=1e-4)
                assert int(line["n"]) == number.n
    line = found["best", "one", "pgd-10_eps1"]
    assert (line["method"], line["shots"], line["eps"], line["kind"]) == ("mmcoa", "5", "1/255", "image")
    assert json.loads(line["protocol"])["steps"] == 10


def test_csv_compares_with_the_baseline(results):
    lines = list(csv.DictReader(io.StringIO(document_csv(build(results, baseline="untouched")))))
    (section,) = sections(results)
    by_name = {s.name: s for s in section.subjects}
    line = next(x for x in lines if (x["model"], x["dataset"], x["attack"]) == ("best", "two", "worst"))
    pair = section.compare(by_name["best"], by_name["untouched"], "two", section.main)
    assert (int(line["only_this_right"]), int(line["only_baseline_right"])) == (pair.first, pair.second)
    assert float(line["p"]) == pytest.approx(pair.p, rel=1e-2)


def test_the_best_of_each_column_is_bold(results):
    text = document_markdown(build(results), {})
    table = text.split("**average over 2 data sets")[1].split("\n\n")[1]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    best = next(row for row in rows if row.startswith("| best"))
    assert best.count("**") >= 2 * 4  # under every attack; clean may be another's
    assert "95 % Wilson intervals" in text and "per sample" in text and "prompt 'a {}'" in text
    assert all(line.count("|") - line.count("\\|") == rows[0].count("|") for line in rows)


def test_a_partial_worst_case_is_marked_and_never_bold(results, tmp_path):
    for dataset in ("one", "two"):
        for attack in (CLEAN, pgd(), BERT):
            put(tmp_path, "flattered", attack, bits(1, p=1.0), dataset=dataset)
    text = document_markdown(build(read_results([str(tmp_path)])), {})
    for title in ("average over 2 data sets", "worst case: accuracy"):
        table = text.split(f"**{title}")[1].split("\n\n")[1]
        worst = {line.split("|")[1].strip(): line.split("|")[-2] for line in table.splitlines()}
        assert "100†" in worst["flattered"] and "**" not in worst["flattered"] and "**" in worst["best"]
    assert text.count("† over fewer attacks") == 2


def test_attacks_of_the_same_settings_are_described_in_one_breath(tmp_path):
    for eps in ("1/255", "2/255"):
        put(tmp_path, "m", pgd(eps), bits(1))
    put(tmp_path, "m", pgd("4/255", steps=20), bits(1))
    text = document_markdown(build(read_results([str(tmp_path)])), {})
    assert "pgd-10 1/255, pgd-10 2/255: steps 10, step 1/255" in text and "pgd-20 4/255: steps 20" in text


def test_words_stand_left_and_numbers_right():
    document = Document(title="", summary=(), parts=[WORDS])
    assert "| model | about | value |\n| --- | --- | ---: |" in document_markdown(document, {})
    assert r"\begin{tabular}{llr}" in document_latex(document, {})


def test_a_loss_does_not_look_like_a_gain(tmp_path):
    for model, right in (("better", 45), ("middle", 25), ("worse", 5)):
        put(tmp_path, model, pgd(), [i < right for i in range(50)])
    results = read_results([str(tmp_path)])
    compared = build(results, baseline="middle").parts[1].grids[0]
    assert {name: (c.text, c.emphasis) for name, (c,) in compared.rows} == {
        "better": ("+40.0", "higher"),
        "worse": ("−40.0", "lower"),
    }
    page = make_report(results, "html", baseline="middle", beside=tmp_path)
    assert '<b class="lower">−40.0</b>' in page and '<b class="higher">+40.0</b>' in page


@pytest.mark.parametrize("form", ["md", "tex", "html"])
def test_no_heading_is_empty_and_where_numbers_come_from_is_last(results, tmp_path, form):
    text = make_report(results, form, beside=tmp_path)
    heads = re.findall({"md": "## (.*)", "tex": r"\\subsection\*{(.*)}", "html": "<h2 .*?>(.*?)</h2>"}[form], text)
    compared = ["Figures", "Compare two models"] if form == "html" else []
    assert heads == ["Results", "Compared with best", *compared, "Where the numbers come from"]
    assert form != "html" or "<details>" in text.partition("Where the numbers come from</h2>")[2]


def test_drawing_tells_how_far_it_is(results, tmp_path):
    told = []
    make_report(results, "md", beside=tmp_path, figures=tmp_path / "f", tell=lambda *step: told.append(step))
    assert {path.stem for path in (tmp_path / "f").iterdir()} == {name for name, _, _ in told}
    assert [(done, total) for _, done, total in told] == [(i, len(told)) for i in range(len(told))]


def test_an_unknown_baseline_is_refused(results):
    with pytest.raises(UserError, match="there is no model 'nobody'"):
        build(results, baseline="nobody")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(results, tmp_path):
    text = make_report(results, "tex", figures=tmp_path / "figures", beside=tmp_path, against=["mmcoa:II"])
    assert r"\toprule" in text and text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 5
    assert "includegraphics" in text
    (tmp_path / "report.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    log = (tmp_path / "report.log").read_text(encoding="latin-1")
    assert not re.search(r"Overfull \\hbox \((\d{2,})", log), "nothing stands out of its page by 10 points"


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_of_many_models_and_data_sets_compiles(tmp_path):
    for m in range(45):
        for d in range(9):
            put(tmp_path / "results", f"model {m}", pgd(), bits(m + d, 10), dataset=f"set{d}")
    (tmp_path / "report.tex").write_text(document_latex(build(read_results([str(tmp_path / "results")])), {}))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


class Page(HTMLParser):
    """Tags with their attributes, and what stands open."""

    VOID = frozenset(("meta", "link", "input", "br", "img", "path", "use", "rect", "image"))

    def __init__(self, text):
        super().__init__()
        self.tags, self._open = [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag


def pages(results, tmp_path):
    report = make_report(results, "html", beside=tmp_path)
    return report, make_leaderboard(results, "Board")["index.html"]


def test_pages_are_self_contained(results, tmp_path):
    for text in pages(results, tmp_path):
        page = Page(text)
        for tag, attrs in page.tags:
            for name in ("src", "href", "xlink:href", "action"):
                target = attrs.get(name) or ""
                assert re.match(r"(#|data:|leaderboard\.(csv|json)$|$)", target), (tag, target)
        styles = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
        assert "@import" not in styles and not re.search(r"url\((?!#)", styles)
        assert "<script>alert" not in text


def test_pages_have_landmarks_captions_and_scopes(results, tmp_path):
    for text in pages(results, tmp_path):
        page = Page(text)
        tags = [tag for tag, _ in page.tags]
        assert tags.count("main") == tags.count("header") == tags.count("h1") == 1
        assert tags.count("caption") == tags.count("table")
        assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        for _, attrs in page.tags:
            for name in (attrs.get("aria-labelledby") or "").split():
                assert name in ids
        labels = sum(tag == "label" for tag, _ in page.tags)
        assert labels == sum(tag in ("input", "select") for tag, _ in page.tags)


def test_parts_with_other_settings_keep_their_figures(results, tmp_path):
    put(tmp_path, "other", CLEAN, bits(1), resolution="model")
    put(tmp_path, "other", pgd(), bits(2), resolution="model")
    text = make_report(read_results([str(tmp_path)]), "md", figures=tmp_path / "figures", beside=tmp_path)
    assert "## Results: prompt 'a {}', curated class names, model resolution" in text
    assert {"bars.svg", "bars-section2.svg"} <= {p.name for p in (tmp_path / "figures").iterdir()}
    pages(read_results([str(tmp_path)]), tmp_path)


def test_the_leaderboard_ranks_by_the_worst_case_within_a_threat(results):
    text = make_leaderboard(results, "Board")["index.html"]
    rows = re.findall(r"<tr data-id=.*?</tr>", text)
    (section,) = sections(results)
    number = {s.name: section.number(s, "average", section.main).top1 for s in section.subjects}
    mine = [r for r in rows if 'data-threat="l∞ 1/255, all attacks"' in r and 'data-dataset="average"' in r]
    shown = [float(re.findall(r'data-value="([\d.]+)"', row)[1]) for row in mine]
    assert shown == pytest.approx(sorted(number.values(), reverse=True), rel=1e-5)
    assert {re.search('data-threat="(.*?)"', row)[1] for row in rows} == {
        "l∞ 1/255, all attacks",
        "l∞ 1/255, images",
        "l∞ 1/255, images and texts at once",
        "texts",
    }


def test_results_to_hand_in_follow_their_schema_and_link_to_the_zoo(results, tmp_path):
    from rayclip.models.checkpoint import model_record

    spec = "zoo:fare4-vit-l-14"
    put(tmp_path, spec, pgd(), bits(1), dataset="one")
    Store(str(tmp_path)).write_json(f"lineage/{fingerprint(spec)}.json", model_record(spec))
    results = read_results([str(tmp_path)])
    board, schema = (
        make_leaderboard(results, "Board"),
        resources.files("rayclip.reports") / "static/results.schema.json",
    )
    for text in (board["leaderboard.json"], make_report(results, "json", against=["mmcoa:I"], beside=tmp_path)):
        jsonschema.validate(json.loads(text), json.loads(schema.read_text()))
    found = json.loads(board["leaderboard.json"])
    assert len(found["numbers"]) == len(list(csv.DictReader(io.StringIO(board["leaderboard.csv"]))))
    (model,) = (model for model in found["models"] if model["spec"] == spec)
    links = ["https://arxiv.org/abs/2402.12336", "https://huggingface.co/chs20/fare4-clip"]
    assert [model["paper"], model["checkpoint"]] == links
    assert (model["method"], model["architecture"], model["trained_from"]) == ("fare", "ViT-L-14", "ViT-L-14:openai")
    row = next(row for row in re.findall(r"<tr data-id=.*?</tr>", board["index.html"]) if spec in row)
    assert all(f'<a href="{link}">' in row for link in links) and ">ViT-L-14<" in row


def test_a_model_without_all_data_sets_has_no_average_on_the_leaderboard(results, tmp_path):
    put(tmp_path, "guest", pgd(), bits(1), dataset="one")
    rows = re.findall(r"<tr data-id=.*?</tr>", make_leaderboard(read_results([str(tmp_path)]), "Board")["index.html"])
    guest = [re.search('data-dataset="(.*?)"', row)[1] for row in rows if "guest" in row]
    assert set(guest) == {"one"}


BRACKETS = ["tecoa[eps=1]", "x[/b]", "[a](http://b)", "a|b", "`c`", "*d*", "$x_{$ and $", "_e_", "f<g>", "模", "型"]


def shown_in_markdown(text):
    """What GitHub shows of a cell without any markup: escapes and entities undone."""
    return html.unescape(re.sub(r"\\([\\`*_\[\]|~])", r"\1", text))


@pytest.mark.parametrize("form", ["md", "html", "tex", "csv"])
def test_names_are_whole_in_every_form(tmp_path, form):
    for m, model in enumerate(BRACKETS):
        for attack in (CLEAN, pgd()):
            put(tmp_path / "results", model, attack, bits(m), dataset="d[1]|$x$")
    results = read_results([str(tmp_path / "results")])
    text = make_report(results, form, beside=tmp_path, figures=None if form == "csv" else tmp_path / "my figures")
    if form == "md":
        (table,) = re.findall(r"\*\*d.*?accuracy in %\*\*\n\n(.*?)\n\n", text, re.DOTALL)
        rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines()[2:]]
        assert {shown_in_markdown(row[1].strip()) for row in rows} == set(BRACKETS)
        assert {len(row) for row in rows} == {5}, "a bar in a name begins no cell"
        assert "](my%20figures/" in text, "a blank ends a picture's address"
    elif form == "html":
        assert {html.unescape(name) for name in re.findall('<tr data-id="(.*?)">', text)} == set(BRACKETS)
    elif form == "tex":
        assert r"\textbackslash{}u6a21" in text and r"\textbackslash{}u578b" in text, "two names stay two"
        assert r"\$x\_\{\$" in text
    else:
        assert {line["model"] for line in csv.DictReader(io.StringIO(text))} == set(BRACKETS)


def test_the_table_of_an_evaluation_is_markdown_whatever_names_are(tmp_path):
    rows = [
        Row(
            model=name,
            dataset="d|1",
            attack="clean",
            eps=None,
            steps=None,
            n=4,
            top1=75.0,
            ci_low=30.0,
            ci_high=95.0,
            protocol={"attack": "clean", "template": "a {}", "resolution": "native", "precision": "fp32", "seed": 0},
            cell=name,
        )
        for name in BRACKETS
    ]
    lines = [line for line in markdown_tables(rows, {}).splitlines() if line.startswith("| ")][2:]
    assert [shown_in_markdown(re.split(r"(?<!\\)\|", line)[1].strip()) for line in lines] == BRACKETS

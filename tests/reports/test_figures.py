"""Figures: there where their data are, and saying what the data say."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from rayclip.reports.build import changed_words
from rayclip.reports.figures import as_svg, section_figures, write_figure
from rayclip.reports.figures.embeddings import mean_cosine
from rayclip.reports.figures.style import shorten
from rayclip.reports.figures.tradeoff import interpolations
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from rayclip.store import Store
from reports.made import BERT, CLEAN, SEP, bits, describe, fingerprint, pgd, put


def drawn(root):
    results = read_results([str(root)])
    (section,) = sections(results)
    return {figure.name: figure for figure in section_figures(results, section)}


def shown(figure):
    """The words of a figure, as its SVG has them."""
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]+)</text>", as_svg(figure))]


def lines(figure, panel=0):
    """The (x, y) points of each line of a panel."""
    ax = figure.draw(3).axes[panel]
    return [np.round(line.get_xydata(), 4).tolist() for line in ax.get_lines() if line.get_marker() not in ("", "None")]


def test_one_model_under_one_attack_has_nothing_to_draw(tmp_path):
    put(tmp_path, "m", pgd(), bits(1))
    assert drawn(tmp_path) == {}


def test_accuracy_over_shots(tmp_path):
    values = {}
    for method in ("tecoa", "mmcoa"):
        for i, shots in enumerate((5, 50, 1, None)):
            model = f"local-dir:/{method}-{shots}"
            values[method, shots] = bits(10 * (method == "mmcoa") + i)
            put(tmp_path, model, CLEAN, values[method, shots])
            describe(
                tmp_path,
                model,
                label=f"{method} {shots}-shot" if shots else f"{method} full",
                method=method,
                shots=shots,
            )
    put(tmp_path, "digits", CLEAN, bits(1))
    figure = drawn(tmp_path)["shots"]
    order = (1, 5, 50, None)
    ours = {tuple(map(tuple, line)) for line in lines(figure)}
    assert ours == {
        tuple((float(i), round(100 * values[m, s].mean(), 4)) for i, s in enumerate(order)) for m in ("tecoa", "mmcoa")
    }
    assert {"1", "5", "50", "full", "tecoa", "mmcoa", "digits"} <= set(shown(figure)), "the level line has a name"


def test_accuracies_go_from_0_to_100_percent_in_every_panel(tmp_path):
    for model in ("a", "b"):
        for attack in (CLEAN, pgd("1/255"), pgd("2/255"), BERT, SEP):
            put(tmp_path, model, attack, bits(1, p=0.1))
            put(tmp_path, model, attack, bits(1, p=0.1), dataset="other")
    figures = drawn(tmp_path)
    assert {"eps", "tradeoff", "bars"} <= set(figures)
    for name in ("eps", "tradeoff", "bars"):
        for columns in (1, 3):
            axes = figures[name].draw(columns).axes
            assert {ax.get_ylim() for ax in axes} == {(0, 100)}
    (ax,) = figures["tradeoff"].draw(3).axes
    assert ax.get_xlim() == (0, 100)
    assert [t.get_text() for t in figures["eps"].draw(3).axes[0].get_xticklabels()] == ["2/255", "1/255", "0"]


def test_accuracy_over_eps_begins_clean(tmp_path):
    put(tmp_path, "m", CLEAN, bits(1, p=0.9))
    for eps in (4, 1, 2):
        put(tmp_path, "m", pgd(f"{eps}/255"), bits(eps, p=0.4))
    expected = [[0.0, 100 * bits(1, p=0.9).mean()]] + [[float(e), 100 * bits(e, p=0.4).mean()] for e in (1, 2, 4)]
    assert lines(drawn(tmp_path)["eps"]) == [np.round(expected, 4).tolist()]


def test_accuracy_over_training_steps_begins_untouched(tmp_path):
    put(tmp_path, "digits", CLEAN, bits(9))
    for step in (200, 100):
        put(tmp_path, f"local-dir:/x/epoch-{step}", CLEAN, bits(step))
        describe(
            tmp_path,
            f"local-dir:/x/epoch-{step}",
            label=f"tecoa epoch {step // 100}",
            method="tecoa",
            step=step,
            digest="d",
        )
    store = Store(str(tmp_path))
    for name in store.names("lineage", ".json"):
        record = store.read_json(name)
        record["lineage"]["config"]["model_fingerprint"] = fingerprint("digits")
        store.write_json(name, record)
    expected = [[0.0, 100 * bits(9).mean()], [100.0, 100 * bits(100).mean()], [200.0, 100 * bits(200).mean()]]
    figure = drawn(tmp_path)["steps"]
    assert lines(figure) == [np.round(expected, 4).tolist()]
    assert "tecoa" in shown(figure)


def test_runs_of_one_name_are_told_apart_by_what_differs(tmp_path):
    store = Store(str(tmp_path))
    for seed in (0, 1):
        for step in (100, 200):
            model = f"local-dir:/{seed}/epoch-{step}"
            put(tmp_path, model, CLEAN, bits(10 * seed + step))
            describe(tmp_path, model, label=f"tecoa epoch {step // 100}", method="tecoa", step=step, digest=f"d{seed}")
            name = f"lineage/{fingerprint(model)}.json"
            record = store.read_json(name)
            record["lineage"]["config"] |= {"seed": seed, "model_fingerprint": "x"}
            store.write_json(name, record)
    figure = drawn(tmp_path)["steps"]
    assert {"tecoa seed 0", "tecoa seed 1"} <= set(shown(figure)) and len(lines(figure)) == 2


def test_of_a_run_the_last_checkpoint_stands_over_its_shots(tmp_path):
    for shots in (1, 5):
        for step in (1, 2):
            model = f"local-dir:/{shots}/epoch-{step}"
            put(tmp_path, model, CLEAN, bits(10 * shots + step))
            label = f"tecoa {shots}-shot epoch {step}"
            describe(tmp_path, model, label=label, method="tecoa", shots=shots, step=step, digest=f"d{shots}")
    figures = drawn(tmp_path)
    ends = [[float(i), 100 * bits(10 * shots + 2).mean()] for i, shots in enumerate((1, 5))]
    assert lines(figures["shots"]) == [np.round(ends, 4).tolist()] and "tecoa" in shown(figures["shots"])
    assert len(lines(figures["steps"])) == 2


def test_six_panels_hold_every_kind_of_attack(tmp_path):
    attacks = [CLEAN, *(pgd(steps=steps) for steps in (1, 2, 3, 4, 5)), BERT, SEP]
    for step in (1, 2):
        for attack in attacks:
            put(tmp_path, f"m{step}", attack, bits(step))
        describe(tmp_path, f"m{step}", label=f"tecoa epoch {step}", method="tecoa", step=step, digest="d")
    titles = [ax.get_title() for ax in drawn(tmp_path)["steps"].draw(3).axes]
    assert titles == ["clean", "pgd-1 1/255", "pgd-2 1/255", "bert", "sep pgd-10 1/255", "worst case"]


def test_the_tradeoff_joins_the_weights_between_two_models(tmp_path):
    for i, model in enumerate(
        ("digits", "local-dir:/x", *(f"mix:digits+local-dir:/x@{a}" for a in ("0.75", "0.25", "0.5")))
    ):
        put(tmp_path, model, CLEAN, bits(i, p=0.9))
        put(tmp_path, model, pgd(), bits(i + 10, p=0.4))
    describe(tmp_path, "local-dir:/x", method="tecoa")
    (section,) = sections(read_results([str(tmp_path)]))
    (curve,) = interpolations(section.subjects).values()
    assert [s.model.spec.rpartition("@")[2] for s in curve] == ["digits", "0.25", "0.5", "0.75", "local-dir:/x"]
    figure = drawn(tmp_path)["tradeoff"]
    assert "weights lie between two others" in figure.caption and "x" in shown(figure)


def test_bars_by_attack_or_by_data_set(tmp_path):
    for model in ("a", "b"):
        put(tmp_path, model, CLEAN, bits(1))
        put(tmp_path, model, pgd(), bits(2))
    assert {"clean", "pgd-10", "1/255", "a", "b"} <= set(shown(drawn(tmp_path)["bars"]))
    for model in ("a", "b"):
        put(tmp_path, model, CLEAN, bits(1), dataset="other")
        put(tmp_path, model, pgd(), bits(2), dataset="other")
    assert {"set", "other", "average"} <= set(shown(drawn(tmp_path)["bars"]))


def test_only_the_best_of_many_models_are_drawn(tmp_path):
    for i in range(12):
        put(tmp_path, f"m{i:02}", CLEAN, bits(1))
        put(tmp_path, f"m{i:02}", BERT, np.arange(50) < 4 * i)
    figure = drawn(tmp_path)["bars"]
    assert [text for text in shown(figure) if text.startswith("m")] == ["m00", "m08", "m09", "m10", "m11"]
    assert "7 more models" in figure.caption


def test_changed_words_are_named():
    assert list(changed_words("This is a photo of a zero", "this is a photo of one deline")) == ["a zero → one deline"]
    assert list(changed_words("a b", "A b")) == []
    assert list(changed_words("a cat", "a big cat")) == ["+ big"]


def test_pictures_are_of_an_untouched_and_the_best_model_under_an_attack_that_both_have(tmp_path):
    """The strongest one is kept of a defended model only."""
    for model, p in (("worse", 0.2), ("best", 0.8), ("digits", 0.1)):
        cells = [put(tmp_path, model, pgd(eps), bits(1, p=p)) for eps in ("1/255", "4/255")]
        if model != "digits":
            describe(tmp_path, model, label=model, method="tecoa")
        show(tmp_path, cells[0])
    show(tmp_path, put(tmp_path, "worse", pgd("4/255"), bits(1, p=0.1), defense="ttc"))
    titles = [f.title for name, f in drawn(tmp_path).items() if name.startswith("images")]
    assert titles == ["digits on set under pgd-10 1/255", "best on set under pgd-10 1/255"]


def test_pictures_are_found_wherever_they_were_kept(tmp_path):
    """Of the first data set none were kept, of the second those of one model, of the third those of both."""
    for model in ("digits", "m"):
        for dataset in ("a", "b", "c"):
            cell = put(tmp_path, model, pgd(), bits(1), dataset=dataset)
            if dataset == "c" or (model, dataset) == ("m", "b"):
                show(tmp_path, cell)
    describe(tmp_path, "m", label="m", method="tecoa")
    titles = [f.title for name, f in drawn(tmp_path).items() if name.startswith("images")]
    assert titles == ["digits on c under pgd-10 1/255", "m on c under pgd-10 1/255"]


def show(root, cell):
    """Keep a picture of a cell."""
    png = io.BytesIO()
    Image.new("RGB", (2, 2)).save(png, "png")
    pictures = {name: [png.getvalue()] for name in ("clean", "difference", "adversarial")}
    table = {"label": [0], "clean_pred": [0], "adv_pred": [1], **pictures}
    Store(str(root)).write_table(f"cells/{cell}/examples/images.parquet", table)


def test_bars_of_many_data_sets_stand_in_rows_and_leave_out_what_nobody_has(tmp_path):
    for d in range(11):
        for model in ("a", "b"):
            put(tmp_path, model, pgd(), bits(d), dataset=f"set{d}")
    rows = drawn(tmp_path)["bars"].draw(3).axes
    assert [len(ax.get_xticks()) for ax in rows] == [6, 6]
    shown_names = [text.get_text() for ax in rows for text in ax.get_xticklabels()]
    assert shown_names == [*(f"set{d}" for d in range(11)), "average"]


def test_a_crowd_is_named_on_its_front_only(tmp_path):
    right = {}
    for m in range(14):
        model = f"m{m:02}"
        right[model] = [bits(m, p=0.9), bits(100 + m, p=0.4)]
        put(tmp_path, model, CLEAN, right[model][0])
        put(tmp_path, model, pgd(), right[model][1])
        describe(tmp_path, model, label=model, method=("tecoa", "mmcoa")[m % 2])
    figure = drawn(tmp_path)["tradeoff"]
    values = {m: (a.mean(), b.mean()) for m, (a, b) in right.items()}
    front = {
        m for m, (a, b) in values.items() if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in values.values())
    }
    named = figure.caption.partition("one on it: ")[2].rstrip(".").split(", ")
    assert set(named) == front and {"tecoa", "mmcoa"} <= set(shown(figure))
    assert "Whiskers" not in figure.caption


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tecoa 5-shot", "tecoa 5-shot"), ("mmcoa 20-shot epoch 3 + ttc and rn", "mmcoa 20-shot epoc…tc and rn")],
)
def test_long_names_keep_both_ends(name, expected):
    assert shorten(name) == expected and len(shorten(name)) <= 28


def test_the_mean_cosine_is_over_pairs():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 7, 5))
    expected = sum(x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)) / 7
    assert mean_cosine(a, b) == pytest.approx(expected)


def test_a_figure_is_vector_and_png_the_same_every_time_and_themed_in_pages(tmp_path):
    for model in ("a", "b"):
        put(tmp_path / "results", model, CLEAN, bits(1))
        put(tmp_path / "results", model, pgd(), bits(2))
    figure = drawn(tmp_path / "results")["bars"]
    paths = write_figure(figure, tmp_path / "figures")
    assert paths["svg"].read_text().startswith("<?xml") and paths["pdf"].read_bytes().startswith(b"%PDF")
    assert min(Image.open(paths["png"]).size) > 400
    first = {form: path.read_bytes() for form, path in paths.items()}
    assert {form: path.read_bytes() for form, path in write_figure(figure, tmp_path / "figures").items()} == first
    assert not list((tmp_path / "figures").glob("*.partial"))
    page = as_svg(figure)
    assert page == as_svg(figure) and page.startswith("<svg")
    assert "var(--c1)" in page and "var(--ink)" in page and not re.search(r"#[0-9a-f]{6}\b", page)

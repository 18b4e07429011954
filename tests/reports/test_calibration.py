"""Calibration: errors against the formula, tables and diagrams on request, and results from before confidences."""

import csv
import io
import json

import numpy as np
import pytest

from rayclip.reports import make_report
from rayclip.reports.build import build
from rayclip.reports.calibration import calibrate, reliability
from rayclip.reports.figures.reliability import reliability_figure
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from reports.made import CLEAN, bits, pgd, put


def naive_ece(confidence, right, bins=15):
    total = 0.0
    for m in range(1, bins + 1):
        own = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if own:
            gap = abs(np.mean([right[i] for i in own]) - np.mean([confidence[i] for i in own]))
            total += len(own) / len(confidence) * gap
    return 100 * total


def sure(seed, n=50):
    return np.random.default_rng(seed).uniform(0.1, 1, n).astype(np.float32)


def test_errors_are_those_of_the_formula():
    for seed in range(20):
        confidence, right = sure(seed, 200).astype(float), bits(seed, 200)
        assert reliability(confidence, right).ece == pytest.approx(naive_ece(confidence, right), abs=1e-9)
    edges = reliability(np.array([1 / 15, 1.0, 0.0]), np.array([True, True, False]))
    assert edges.count_M[0] == 2 and edges.count_M[-1] == 1, "a bin includes its upper edge"
    assert reliability(np.array([0.75] * 4), np.array([True] * 3 + [False])).ece == pytest.approx(0)


def test_a_report_has_errors_and_a_diagram_on_request_only(tmp_path):
    values = {}
    for d, dataset in enumerate(("one", "two")):
        for a, attack in enumerate((CLEAN, pgd())):
            right, confidence = bits(2 * d + a), sure(2 * d + a)
            values[dataset, attack[0]] = naive_ece(confidence, right)
            put(tmp_path, "m", attack, right, dataset=dataset, confidence=confidence)
            put(tmp_path, "old", attack, right, dataset=dataset)
    results = read_results([str(tmp_path)])
    assert "ECE" not in make_report(results, "md", beside=tmp_path)
    text = make_report(results, "md", calibration=True, beside=tmp_path)
    (row,) = [line for line in text.partition("## Calibration")[2].splitlines() if line.startswith("| m |")][:1]
    means = [(values["one", a] + values["two", a]) / 2 for a in ("clean", pgd()[0])]
    assert row == f"| m | {means[0]:.1f} | {means[1]:.1f} |" and "evaluated before confidences" in text
    lines = csv.DictReader(io.StringIO(make_report(results, "csv", calibration=True, beside=tmp_path)))
    found = {(line["model"], line["dataset"], line["attack"]): line["ece"] for line in lines}
    assert {key[1:]: float(v) for key, v in found.items() if key[0] == "m" and v} == pytest.approx(values, abs=1e-4)
    assert {v for key, v in found.items() if key[0] == "old"} == {""}
    numbers = json.loads(make_report(results, "json", calibration=True, beside=tmp_path))["numbers"]
    assert len([number for number in numbers if "ece" in number]) == 4


def test_the_diagram_is_among_the_figures(tmp_path):
    put(tmp_path / "results", "m", CLEAN, bits(1), confidence=sure(1))
    results = read_results([str(tmp_path / "results")])
    text = make_report(results, "md", calibration=True, figures=tmp_path / "figures", beside=tmp_path)
    assert (tmp_path / "figures" / "reliability.svg").is_file() and "(figures/reliability.svg)" in text


def test_the_diagram_draws_accuracy_over_confidence_of_all_samples(tmp_path):
    for i, dataset in enumerate(("one", "two")):
        put(tmp_path, "m", pgd(), bits(i), dataset=dataset, confidence=sure(i))
    (section,) = sections(read_results([str(tmp_path)]))
    (figure,) = reliability_figure(section, calibrate(section))
    (ax,) = figure.draw(3).axes
    drawn = ax.get_lines()[1].get_xydata()
    together = reliability(np.concatenate([sure(0), sure(1)]), np.concatenate([bits(0), bits(1)]))
    some = together.count_M > 0
    expected = 100 * np.stack([together.confidence_M, together.accuracy_M], 1)[some]
    assert np.allclose(drawn, expected, atol=1e-4)


def test_results_of_older_versions_say_what_to_do(tmp_path):
    put(tmp_path, "m", pgd(), bits(1))
    document = build(read_results([str(tmp_path)]), calibration=True)
    (part,) = (part for part in document.parts if part.title == "Calibration")
    assert not part.grids and "evaluate" in part.text[0]

"""Methods train on the digits to the numbers of the golden file, and improve what they are meant to improve.

`python tests/benchmarks/all_methods.py --out tests/golden/methods_digits.json` renews the file.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.all_methods import UNTOUCHED, Setting, measure
from rayclip.methods import METHODS

pytestmark = pytest.mark.e2e
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/methods_digits.json").read_text())
POINTS = 4.0  # 18 of 445 images: what another CPU's rounding may move in a run; or what another seed moves, if more
MEASURED = (UNTOUCHED, "tecoa", "mmcoa")  # again; the others' numbers are the file's
NIGHTLY = ("fare", "saft", "advpt")
STRONG = ("pgd-10", "cw-10", "autoattack-seeds")
TOKENS = ("advpt", "apt", "fap")  # learned in front of classes, and FAP's between image patches; all else is frozen


def mean(method, column):
    return sum(run[column] for run in GOLDEN[method]) / len(GOLDEN[method])


@pytest.fixture(scope="module")
def measured(request):
    """The first seed of the methods whose tests run, two processes at a time."""
    asked = {item.callspec.params["method"] for item in request.session.items if "measured" in item.fixturenames}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {name: pool.submit(measure, name, 0, Setting()) for name in asked}
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("method", [*MEASURED, *(pytest.param(name, marks=pytest.mark.slow) for name in NIGHTLY)])
def test_a_methods_numbers_are_those_of_the_golden_file(measured, method):
    found, golden = measured[method], GOLDEN[method][0]
    assert found.keys() == golden.keys()
    for column, value in golden.items():
        values = [run[column] for run in GOLDEN[method]]
        allowed = max(max(values) - min(values), 0.03 if column == "cosine" else POINTS)
        assert found[column] == pytest.approx(value, abs=allowed), column


def test_the_file_holds_every_method_and_three_seeds():
    assert list(GOLDEN) == [UNTOUCHED, *METHODS]
    assert all(len(runs) == 3 for method, runs in GOLDEN.items() if method != UNTOUCHED)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ft-standard", "leaf", *TOKENS)])
def test_adversarial_methods_improve_robust_accuracy(method):
    """Weights that are trained hold nearly two thirds of the images, a frame around a frozen model some, and so do
    features that only their own adversarial form holds in their place."""
    for attack in STRONG:
        gain = {"vp": 8, "sim-clip": 10}.get(method, 40)
        assert mean(method, attack) > mean(UNTOUCHED, attack) + gain, attack
    assert mean(method, "clean") > 95


@pytest.mark.parametrize("method", TOKENS)
def test_tokens_on_frozen_encoders_help_against_weak_attacks_only(method):
    assert mean(method, "fgsm") > mean(UNTOUCHED, "fgsm") + 5
    assert mean(method, "pgd-10") > mean(UNTOUCHED, "pgd-10") + {"advpt": 1}.get(method, 5)
    assert abs(mean(method, "autoattack-seeds") - mean(UNTOUCHED, "autoattack-seeds")) < 3
    assert (mean(method, "cosine") == 1.0) == (method != "fap") and mean(method, "cosine") > 0.98


def test_a_text_encoder_that_characters_trained_holds_when_words_change_and_leaves_images_alone():
    """Its attack, Charmer, is no column here; see `methods/test_leaf.py`."""
    assert mean("leaf", "bert") > mean(UNTOUCHED, "bert") + 30 and mean("leaf", "cosine") == 1.0
    assert mean("leaf", "clean") >= mean(UNTOUCHED, "clean")


def test_what_the_papers_say_of_each_other():
    """FARE keeps clean features closer than TeCoA does, LORE closer still; MMCoA holds where texts are attacked."""
    assert mean("fare", "cosine") > mean("tecoa", "cosine") + 0.1
    assert mean("fare", "clean") >= mean("tecoa", "clean") - 0.5
    assert mean("lore", "cosine") >= mean("fare", "cosine") and mean("lore", "pgd-10") > mean("fare", "pgd-10") - 1
    assert mean("mmcoa", "bert") > mean("tecoa", "bert") + 20
    assert mean("mmcoa", "sep-10") > mean("tecoa", "sep-10") + 20

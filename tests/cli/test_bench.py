"""`rayclip bench`, and the results that `tests/benchmarks/history/` keeps."""

import json
from pathlib import Path

import pytest

from calling import call

HISTORY = Path(__file__).parents[1] / "benchmarks" / "history"
QUICK = ("bench", "--batch", 8, "--attacks", "pgd:steps=2", "--no-whole", "--quiet")

SEVERAL = "advpt,lore,saft:sets=2,captions=templates,tecoa:trains=last-1,steps=1"


@pytest.mark.ci
def test_rates_beside_plain_loops_and_beside_an_earlier_result(monkeypatch, capsys, tmp_path):
    code, _, _ = call(monkeypatch, capsys, *QUICK, "--json", tmp_path / "now.json")
    found = json.loads((tmp_path / "now.json").read_text())
    rates = {(rate["kind"], rate["name"]): rate for rate in found["rates"]}
    assert code == 0 and list(rates) == [("data", "decode-jpeg"), ("attack", "pgd-2"), ("method", "tecoa")]
    assert found["matrix"]["fp32"] > 1e9 and found["copy"] > 1e8 and found["about"]["batch"] == 8
    for kind in (("attack", "pgd-2"), ("method", "tecoa")):
        assert 0 < rates[kind]["share"] < 1.5 and rates[kind]["plain_per_s"] > 0
        assert rates[kind]["gigabytes"] is rates[kind]["waits"] is None  # no GPU

    for rate in found["rates"]:
        rate["images_per_s"] *= 100 if rate["kind"] == "method" else 0.01
    (tmp_path / "before.json").write_text(json.dumps(found))
    code, out, _ = call(monkeypatch, capsys, *QUICK, "--against", tmp_path / "before.json")
    slower = [line for line in out.splitlines() if line.startswith("slower")]
    assert code == 0 and len(slower) == 1 and "tecoa" in slower[0]

    found["about"]["batch"] = 16
    (tmp_path / "before.json").write_text(json.dumps(found))
    code, out, _ = call(monkeypatch, capsys, *QUICK, "--methods", SEVERAL, "--against", tmp_path / "before.json")
    assert code == 0 and "slower" not in out and "another batch" in out
    assert all(name in out for name in ("advpt", "lore", "saft"))


@pytest.mark.parametrize(
    "wrong",
    [
        ("--precision", "fp8"),
        ("--model", "ViT-Z:random"),
        ("--batch", "100000"),
        ("--against", "nowhere.json"),
        ("--methods", "tekoa"),
        ("--eps", "8"),
        ("--json", "/proc/none/now.json"),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, wrong):
    code, _, err = call(monkeypatch, capsys, *QUICK, *wrong)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.ci
def test_a_random_model_is_right_about_its_images(monkeypatch, capsys, tmp_path):
    out = tmp_path / "random.json"
    more = ("--model", "ViT-M-32-alt:random", "--batch", 2, "--methods", "none", "--json", out)
    code, _, _ = call(monkeypatch, capsys, "bench", "--attacks", "pgd:steps=1", "--no-whole", "--quiet", *more)
    assert code == 0 and json.loads(out.read_text())["about"]["model"] == "ViT-M-32-alt:random"


def test_the_history_names_its_machines():
    files = sorted(HISTORY.glob("*.json"))
    assert files
    for file in files:
        about = json.loads(file.read_text())["about"]
        assert {"date", "name", "torch", "commit"} <= set(about), file.name

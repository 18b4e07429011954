"""The leaderboard's rows: protocols, blind and adaptive columns, costs, and published numbers beside measured ones."""

import json
import re

import jsonschema
import numpy as np
import pytest

from rayclip.data.sampling import webdataset_draw
from rayclip.evaluation.cell import described_budget
from rayclip.evaluation.costs import Hardware, timing
from rayclip.evaluation.plan import chosen_positions
from rayclip.evaluation.reading import NOT_READ
from rayclip.models.checkpoint import model_record
from rayclip.reports import make_leaderboard
from rayclip.reports.protocols import field_protocols
from rayclip.reports.published import numbers_of
from rayclip.reports.results import read_results
from rayclip.store import Store
from reports.made import bits, fingerprint, put

SPEC, N = "zoo:fare4-vit-l-14", 1_000
HARDWARE = Hardware(name="cpu", gpus=0.0, cores=1)


def cells(protocol, aim=""):
    """The attacks of one of the field's protocols, as results of three classes name and describe them."""
    for attack in (attack.for_classes(3) for attack in field_protocols()[protocol].attacks):
        through = aim if attack.needs_eps else ""
        settings = {"attack": attack.name, **described_budget(attack), **attack.describe()}
        yield f"{attack.label_with_budget}{through and f'_{through}'}", settings, through


@pytest.fixture(scope="module")
def board(tmp_path_factory, shared_schema):
    """A published model on CIFAR-10 as RobustVLM evaluates it, also behind TTC; another by a template."""
    root = tmp_path_factory.mktemp("board")
    protocol = field_protocols()["robustvlm"]
    drawn = {"positions": webdataset_draw((10_000,), N), "scorer": protocol.scorer, **protocol.settings("cifar10")}
    at = {"dataset": "cifar10", "shard": 500, "note": timing(2.0, HARDWARE, NOT_READ)}
    right = {}
    for i, (defense, aim) in enumerate((("none", ""), ("ttc", ""), ("ttc", "bpda"))):
        for j, (label, settings, through) in enumerate(cells("robustvlm", aim)):
            found = right[defense, label] = bits(10 * i + j, N, 0.9 if label == "clean" else 0.7)
            more = {"aim": through} if through else {}
            put(root, SPEC, (label, settings), found, defense=defense, **drawn, **at, **more)
    even = drawn | {"positions": chosen_positions(10_000, N), "scorer": "template"}
    for label, settings, _ in cells("robustvlm"):
        put(root, "other", (label, settings), bits(99, N), **even, **at)
    Store(str(root)).write_json(f"lineage/{fingerprint(SPEC)}.json", model_record(SPEC))
    made = make_leaderboard(read_results([str(root)]), "Board")
    found = json.loads(made["leaderboard.json"])
    jsonschema.validate(found, shared_schema)
    return made["index.html"], found["board"], right


@pytest.fixture(scope="module")
def shared_schema():
    from importlib import resources

    return json.loads((resources.files("rayclip.reports") / "static/results.schema.json").read_text())


def only(rows, **wanted):
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return row


def test_a_defended_model_has_blind_adaptive_and_worst_case(board):
    _, rows, right = board
    row = only(rows, model=f"{SPEC} + ttc", threat="l∞ 4/255, images")
    (blind,) = (v for k, v in right.items() if k[0] == "ttc" and k[1].endswith("eps4"))
    (adaptive,) = (v for k, v in right.items() if k[0] == "ttc" and k[1].endswith("eps4_bpda"))
    clean = right["ttc", "clean"]
    wanted = {"blind": blind, "adaptive": adaptive, "robust": blind & adaptive}
    assert {key: row[key] for key in wanted} == {k: pytest.approx(100 * (v & clean).mean()) for k, v in wanted.items()}
    plain = only(rows, model=SPEC, threat="l∞ 4/255, images", n=N)
    assert not {"blind", "adaptive"} & plain.keys()


def test_the_published_number_of_the_same_protocol_stands_below_the_measured_one(board):
    page, rows, _ = board
    theirs = {
        (r.attack, r.protocol.get("eps")): r.value
        for r in numbers_of("fare")
        if (r.table, r.method, r.dataset, r.protocol.get("train_eps")) == ("4", "FARE", "cifar10", "4/255")
    }
    for eps in ("2/255", "4/255"):
        row = only(rows, model=SPEC, threat=f"l∞ {eps}, images", published="fare:4")
        assert (row["clean"], row["robust"]) == (theirs["clean", None], theirs["image", eps])
        place = [r for r in rows if (r["threat"], r["protocol"]) == (f"l∞ {eps}, images", "robustvlm")].index(row)
        assert rows[rows.index(row) - 1]["model"] == SPEC and place > 0
    unmeasured = [r for r in rows if r.get("published") and r["model"] != SPEC]
    assert {r["published"] for r in unmeasured} == {"fare:4"} and {r["protocol"] for r in unmeasured} == {"robustvlm"}
    assert {r["model"].partition(" ")[0].partition(",")[0] for r in unmeasured} == {"CLIP", "TeCoA", "FARE"}
    assert all(r["threat"].startswith(("l∞ 2/255", "l∞ 4/255")) for r in unmeasured)
    shown = [r for r in re.findall(r"<tr data-id=.*?</tr>", page) if 'data-source="published"' in r]
    assert len(shown) == len(unmeasured) + 2 and not any("data-rank" in r for r in shown)


def test_numbers_of_no_protocol_say_how_they_differ(board):
    _, rows, _ = board
    own = [row for row in rows if row["model"] == "other"]
    said = "own, as robustvlm, but for scorer template (ensemble:templates=clip); images evenly spaced (drawn)"
    assert {row["protocol"] for row in own} == {said}


def test_costs_are_those_of_a_prediction(board):
    page, rows, _ = board
    plain, defended = (only(rows, model=m, threat="l∞ 4/255, images", n=N) for m in (SPEC, f"{SPEC} + ttc"))
    assert plain["ms"] == pytest.approx(4.0) and plain["hardware"] == "cpu, 1 thread"
    assert plain["forwards"] == 1 < defended["forwards"]
    assert '<span class="ci">cpu, 1 thread</span>' in page


def test_only_the_attacks_settings_and_images_of_a_protocol_are_its(tmp_path):
    """Each change by itself takes a cell out of the protocol."""
    protocol = field_protocols()["tecoa"]
    at = {"dataset": "cifar10", "shard": 10_000, "scorer": "template", **protocol.settings("cifar10")}
    label, settings, _ = [*cells("tecoa")][1]
    changes = [{}, {"steps": 10}, {"resize": "antialias"}, {"template": "a {}"}, {"scorer": "ensemble"}, {"n": 500}]
    for i, change in enumerate(changes):
        n = change.pop("n", 10_000)
        put(tmp_path / str(i), "m", (label, settings), np.ones(n, bool), **at | change)
    said = []
    for i in range(len(changes)):
        rows = json.loads(make_leaderboard(read_results([str(tmp_path / str(i))]), "B")["leaderboard.json"])["board"]
        (found,) = {row["protocol"] for row in rows if "n" in row}
        said.append(found)
    assert said[0] == "tecoa" and all(text.startswith("own, as tecoa, but for ") for text in said[1:])
    assert said[2].endswith("resize antialias (plain)") and said[5].endswith("500 images (10,000)")

"""A small real sweep in MLflow: what is logged, and MLflow's own pages of it in headless Chromium."""

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from mlflow import MlflowClient

from calling import run_here
from e2e.test_commands import NO_RAY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "mmcoa_shots.py"


@pytest.fixture(scope="module")
def command(server):
    options = ["--shots", "1,2", "--methods", "tecoa", "--epochs", "2", "--limit", "40", "--out", "sweep"]
    return [sys.executable, str(SWEEP), *options, "--tracking-uri", server.uri]


@pytest.fixture(scope="module")
def done(server, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.fixture(scope="module")
def client(server, done):
    return MlflowClient(server.uri)


@pytest.fixture(scope="module")
def runs(client):
    experiment = client.get_experiment_by_name("mmcoa-shots").experiment_id
    return {r.info.run_name: r for r in client.search_runs([experiment])}


def test_a_sweep_fills_mlflow_as_designed(client, runs, done, command, tmp_path):
    """Parent, children, grandchildren."""
    folder, done = done
    assert "untouched digits" in done.stdout and "tecoa 2-shot" in done.stdout and "rayclip ui" in done.stdout
    trials, models = ["tecoa 1-shot", "tecoa 2-shot"], ["tecoa 1-shot", "tecoa 2-shot", "untouched digits"]
    assert set(runs) == {"mmcoa-shots digits", *models, *(f"eval {m}" for m in models)}
    assert all(r.info.status == "FINISHED" for r in runs.values())

    def parent(name):
        return runs[name].data.tags.get("mlflow.parentRunId")

    top = runs["mmcoa-shots digits"].info.run_id
    assert parent("tecoa 1-shot") == parent("untouched digits") == top
    assert parent("eval tecoa 1-shot") == runs["tecoa 1-shot"].info.run_id
    metrics = runs["eval tecoa 1-shot"].data.metrics
    robust = {"robust/pgd-10_eps32/digits", "robust/bert/digits", "robust/sep_pgd-10_eps32/digits"}
    assert set(metrics) == {"clean/digits", "worst/digits"} | robust
    trained = runs["tecoa 1-shot"].data
    assert metrics.items() <= trained.metrics.items() and trained.params["shots"] == "1", "settings beside numbers"
    untouched = runs["untouched digits"].data
    assert runs["eval untouched digits"].data.metrics.items() <= untouched.metrics.items(), "the baseline is in charts"
    assert untouched.params["method.name"] == "untouched" and untouched.params["template"] == trained.params["template"]
    assert trained.params["method.eps"] == "32/255"
    evaluation = runs["eval tecoa 1-shot"].data.params
    assert evaluation["protocol.template"] == trained.params["template"] and evaluation["attack.bert.k"] == "10"
    assert not [key for key in evaluation if key.startswith("attack.") and key.endswith(".template")]
    assert len(client.get_metric_history(runs["tecoa 1-shot"].info.run_id, "train/loss")) == 2
    pictures = {
        re.split("[+%]", f.path)[0] for f in client.list_artifacts(runs["eval tecoa 1-shot"].info.run_id, "images")
    }
    assert pictures == {"images/digits-pgd-10_eps32", "images/digits-sep_pgd-10_eps32"}
    assert {f.path for f in client.list_artifacts(top)} >= {"results_table.json", "table.md", "results.json"}
    for name in trials:
        (used,) = runs[name].inputs.dataset_inputs
        assert used.dataset.name == "digits" and len(used.dataset.digest) == 16 and used.tags[0].value == "training"
    experiment = client.get_experiment_by_name("mmcoa-shots")
    assert "How many images" in experiment.tags["mlflow.note.content"]
    versions = {v.tags["rayclip.name"]: v for v in client.search_model_versions("name = 'mmcoa-shots'")}
    assert set(versions) == set(trials)
    worst = {name: runs[name].data.metrics["worst/digits"] for name in trials}
    best = client.get_model_version_by_alias("mmcoa-shots", "champion").tags
    assert worst[best["rayclip.name"]] == max(worst.values()) == pytest.approx(float(best["rayclip.worst"]), abs=1e-4)

    again = run_here(folder, *command[2:], "--cluster", program=SWEEP, **NO_RAY)
    assert again.stdout == done.stdout, "a finished sweep prints its table again"
    assert len(client.search_runs([experiment.experiment_id])) == 7, "and opens no new runs"
    rows = json.loads(Path(client.download_artifacts(top, "results_table.json", str(tmp_path))).read_text())["data"]
    assert len(rows) == 3 * 5, "nor a second table"


def test_a_row_of_a_report_leads_to_its_run(runs, done):
    folder, _ = done
    said = run_here(folder, "report", "sweep", "--format", "md").stdout
    for name in ("tecoa 1-shot", "untouched digits"):
        (line,) = [line for line in said.splitlines() if runs[f"eval {name}"].info.run_id in line]
        assert line.startswith(f"| {name} |") and "| 0." in line, "with the version that evaluated it"


def test_ui_opens_a_servers_page_and_names_what_it_has(server, runs, tmp_path):
    command = ["ui", "--no-browser", "--tracking-uri", server.uri, "--experiment"]
    opened = run_here(tmp_path, *command, "mmcoa-shots").stdout
    experiment = next(iter(runs.values())).info.experiment_id
    at = f"{server.uri}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    assert opened == f"MLflow: {at}&viewStateShareKey=rayclip&compareRunsMode=CHART\n"
    wrong = run_here(tmp_path, *command, "another", check=False)
    assert wrong.returncode == 2 and "has no experiment 'another': it has " in wrong.stderr


@pytest.fixture(scope="module")
def visit(server, runs):
    """Open a page of the server's; what it asks of other machines, or a script that fails, fails the tests."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    experiment = next(iter(runs.values())).info.experiment_id
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_context(viewport={"width": 1600, "height": 2600}).new_page()
        page.set_default_timeout(60_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))

        def note(message):
            # MLflow's own page asks for users that a server without users does not have, and says two things of its
            # table and its layout
            known = ("users/current", "ResizeObserver loop")
            where = f"{message.text} {message.location.get('url')}"
            if message.type == "error" and not any(k in where for k in known):
                wrong.append(where)

        page.on("console", note)

        def open_page(path):
            page.goto("about:blank")  # a change of what follows the # alone would not load the page again
            page.goto(f"{server.uri}/#/{path}".replace("EXPERIMENT", experiment))
            return page

        yield open_page
        assert wrong == []
        browser.close()


@pytest.mark.parametrize("mode", ["TABLE", "CHART"])
def test_ui_opens_the_trials_with_accuracies_as_columns_and_charts(visit, runs, mode):
    page = visit(runs_page(viewStateShareKey="rayclip", compareRunsMode=mode))
    for name in ("tecoa 1-shot", "tecoa 2-shot", "untouched digits"):
        page.get_by_role("link", name=name).first.wait_for()
    page.get_by_text("clean/digits" if mode == "TABLE" else "Accuracies in %").first.wait_for()


def test_a_finished_folder_is_logged_to_another_mlflow(runs, done, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        said = run_here(tmp_path, "log", done[0] / "sweep", "--tracking-uri", uri).stdout
        assert "7 runs in experiment 'mmcoa-shots'" in said and "refused" not in said
        client = MlflowClient(uri)
        copies = client.search_runs([client.get_experiment_by_name("mmcoa-shots").experiment_id])
        assert len(copies) == len(runs) == 7
        for copy in copies:
            run = runs[copy.info.run_name]
            assert (copy.data.params, copy.data.metrics) == (run.data.params, run.data.metrics)
            assert (copy.info.status, copy.info.start_time) == (run.info.status, run.info.start_time)
        assert len(client.search_model_versions("name = 'mmcoa-shots'")) == 2
        assert client.get_model_version_by_alias("mmcoa-shots", "champion").tags["rayclip.worst"]


def runs_page(**options):
    return f"experiments/EXPERIMENT/runs?{urllib.parse.urlencode({'workflowType': 'machine_learning', **options})}"


def shown(page):
    """The runs of the table, from top to bottom."""
    rows = page.locator(".ag-center-cols-container .ag-row, .ag-pinned-left-cols-container .ag-row")
    named = rows.filter(has=page.get_by_role("link"))
    found = [(row.bounding_box()["y"], row.get_by_role("link").first.inner_text()) for row in named.all()]
    return list(dict.fromkeys(name for _, name in sorted(found)))


def test_runs_are_searched_sorted_and_compared(visit, runs):
    page = visit(
        runs_page(searchFilter="tags.`rayclip.kind` = 'eval'", orderByKey="metrics.`worst/digits`", orderByAsc="false")
    )
    expected = {"eval tecoa 1-shot", "eval tecoa 2-shot", "eval untouched digits"}
    for name in expected:
        page.get_by_role("link", name=name).first.wait_for()
    page.get_by_text("does each method need?").first.wait_for()
    names = shown(page)
    assert set(names) == expected
    worst = [runs[name].data.metrics["worst/digits"] for name in names]
    assert worst == sorted(worst, reverse=True)
    for name in ("eval tecoa 1-shot", "eval tecoa 2-shot"):
        row = page.locator(".ag-row", has=page.get_by_role("link", name=name, exact=True)).first
        row.locator("[type=checkbox]").first.check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_text("Parallel Coordinates Plot").first.wait_for()
    page.get_by_text("worst/digits").first.wait_for()


def test_a_run_shows_its_table_its_data_and_its_pictures(visit, runs):
    run = runs["eval tecoa 2-shot"].info.run_id
    page = visit(f"experiments/EXPERIMENT/runs/{run}?workflowType=machine_learning")
    page.get_by_text("digits: accuracy in %").first.wait_for()
    page.get_by_text("digits (").first.wait_for()
    page = visit(f"experiments/EXPERIMENT/runs/{run}/model-metrics?workflowType=machine_learning")
    page.get_by_text("digits-pgd-10_eps32").first.wait_for()


def test_the_champion_is_a_model_with_a_signature(visit, client):
    best = client.get_model_version_by_alias("mmcoa-shots", "champion").version
    page = visit(f"models/mmcoa-shots/versions/{best}")
    page.get_by_text("champion").first.wait_for()
    page.get_by_text("Inputs (1)").wait_for()
    page = visit("models/mmcoa-shots")
    page.get_by_text("mlflow models serve").first.wait_for()

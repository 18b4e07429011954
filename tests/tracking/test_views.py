"""What `rayclip ui` opens: the trials of a study, with its accuracies as columns and charts."""

import json
import urllib.parse

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rayclip.tracking import views
from rayclip.tracking.experiment import Experiment


@pytest.fixture
def study(mlflow_uri):
    return Experiment(mlflow_uri, "study")


def add(study, name, kind, metrics, **params):
    run = study.start(name, params=params, tags={"rayclip.kind": kind})
    study.metrics(run, [(metric, 1.0, 0) for metric in metrics], 1)


def opened(study):
    """The page's options, and the view that it opens."""
    page = views.page(study.uri, study.name)
    options = dict(urllib.parse.parse_qsl(page.partition("?")[2]))
    assert page.startswith(f"{study.id}/runs?") and options.pop("workflowType") == "machine_learning"
    tags = study.client.get_experiment(study.id).tags
    text = tags.get(f"mlflow.sharedViewState.{options.get('viewStateShareKey')}", "{}")
    assert len(text) <= 5000
    return options, json.loads(text)


def test_the_trials_of_a_sweep_the_best_worst_case_first(study):
    metrics = ["train/loss", "worst/digits", "clean/digits", "robust/bert/digits"]
    add(study, "sweep", "sweep", [])
    add(study, "a", "train", metrics, shots=1, **{"method.name": "tecoa"})
    add(study, "b", "train", metrics, shots=None, **{"method.name": "mmcoa"})
    add(study, "eval a", "eval", metrics)
    options, view = opened(study)
    assert options == {"viewStateShareKey": "rayclip", "compareRunsMode": "CHART"}
    assert view["searchFilter"] == "tags.`rayclip.kind` = 'train'"
    assert view["orderByKey"] == "metrics.`worst/digits`" and view["orderByAsc"] is False
    shown = ["clean/digits", "robust/bert/digits", "worst/digits"]
    assert view["selectedColumns"] == [f"params.`{p}`" for p in ("method.name", "shots")] + [
        f"metrics.`{name}`" for name in shown
    ]
    parallel, *bars = view["compareRunCharts"]
    assert parallel["selectedMetrics"] == [bar["metricKey"] for bar in bars] == shown
    assert parallel["selectedParams"] == ["method.name"], "numbers among texts would hide runs"


def test_many_data_sets_are_shown_by_their_averages_and_a_view_always_fits(study):
    names = [f"robust/attack-{i}/{80 * 'x'}-{i}" for i in range(60)]
    add(study, "a", "eval", ["clean/digits", *names])
    _, view = opened(study)
    assert 5 < len(view["selectedColumns"]) < 61 and view["searchFilter"] == "tags.`rayclip.kind` = 'eval'"
    add(study, "b", "eval", ["avg/clean", "avg/worst"])
    _, view = opened(study)
    assert view["selectedColumns"] == ["metrics.`avg/clean`", "metrics.`avg/worst`"]


def test_who_may_only_read_gets_the_charts_without_the_columns(study, monkeypatch):
    def refuse(*_):
        raise MlflowException("Permission denied")

    add(study, "a", "train", ["clean/digits"])
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    options, view = opened(study)
    assert view == {} and options == {
        "searchFilter": "tags.`rayclip.kind` = 'train'",
        "orderByKey": "metrics.`clean/digits`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
    }


def test_an_experiment_of_somebody_elses_opens_at_its_runs(study):
    study.start("theirs")
    assert opened(study) == ({}, {})

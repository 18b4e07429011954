"""What the workers of a cluster are told; the rest of connecting is tested on a real Ray (e2e)."""

import json
import sys
from pathlib import Path

import pytest

import rayclip
from rayclip.distributed.connect import _runtime_env


@pytest.fixture(autouse=True)
def nothing_to_import(tmp_path, monkeypatch):
    """The working directory is empty."""
    monkeypatch.chdir(tmp_path)


def test_workers_are_told_which_models_a_checkpoint_may_name_unless_the_job_told_them(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAYCLIP_MODELS", raising=False)
    assert _runtime_env("host:6379") is None, "a worker that is there already need not start anew"
    monkeypatch.setenv("RAYCLIP_MODELS", "/models")
    told = {"env_vars": {"RAYCLIP_MODELS": "/models"}}
    assert _runtime_env("host:6379") == told
    for job, expected in (({}, told), ({"runtime_env": {}}, told), ({"runtime_env": told}, None)):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        assert _runtime_env("host:6379") == expected


def test_workers_of_a_cluster_elsewhere_get_this_very_code(monkeypatch):
    monkeypatch.delenv("RAYCLIP_MODELS", raising=False)
    assert _runtime_env("ray://host:10001") == {"py_modules": [str(Path(rayclip.__file__).parent)]}
    monkeypatch.setenv("RAYCLIP_MODELS", "/models")
    assert _runtime_env("ray://host:10001").keys() == {"py_modules", "env_vars"}


def test_workers_import_as_the_driver_unless_the_job_brings_the_working_directory_or_has_a_start_of_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAYCLIP_MODELS", raising=False)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "pyarrow.py").write_text("")
    assert _runtime_env("host:6379").keys() == {"worker_process_setup_hook"}
    for told in ({"working_dir": "gcs://x"}, {"worker_process_setup_hook": "mine.start"}):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": told}))
        assert _runtime_env("host:6379") is None

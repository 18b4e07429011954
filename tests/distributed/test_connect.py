"""What the workers of a cluster are told; the rest of connecting is tested on a real Ray (e2e)."""

import json
from pathlib import Path

import rayclip
from rayclip.distributed.connect import _runtime_env


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

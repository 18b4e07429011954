"""`precision=auto` is decided when a run is planned, by what its workers will have, so that nobody takes a bf16 run for
an fp32 one."""

import json

import pytest
import ray

from rayclip.distributed.train_worker import count_decoders
from rayclip.distributed.trials import Trial, Workers, find_abandoned_runs, resolve_precision, save_precision
from rayclip.distributed.tuning import run_trials
from rayclip.models.checkpoint import LINEAGE_FILE
from rayclip.progress import Display
from rayclip.store import Store
from rayclip.types import UserError
from training.test_loop import config


def trial(folder, **changes):
    return Trial(name="t", config=config("tecoa", **changes), out=str(folder / "m"))


@pytest.mark.e2e
@pytest.mark.parametrize(("gpus", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_running_ray_is_asked_what_workers_will_have(tmp_path, gpus, precision):
    ray.init(address="local", num_cpus=3, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    try:
        assert count_decoders(on_gpu=bool(gpus)) == (2 if gpus else 0)
        open_, fixed = trial(tmp_path), trial(tmp_path, precision="fp32")
        with resolve_precision([open_, fixed], Store(str(tmp_path)), cluster=False) as (decided, same):
            assert decided.config.precision == precision and same == fixed
            assert decided.train_run == trial(tmp_path, precision=precision).train_run
            assert (decided.train_run == fixed.train_run) == (precision == "fp32")
    finally:
        ray.shutdown()


def test_alone_this_machine_decides_and_no_ray_starts(tmp_path, monkeypatch):
    for has_gpu, precision in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        with resolve_precision([trial(tmp_path)], Store(str(tmp_path / precision)), cluster=False) as (decided,):
            assert decided.config.precision == precision and not ray.is_initialized()


def test_what_an_earlier_start_decided_stays(tmp_path, monkeypatch):
    """Without asking anybody: a finished run needs no cluster."""
    store = Store(str(tmp_path / "store"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with resolve_precision([trial(tmp_path)], store, cluster=False) as begun:
        save_precision(begun, store)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nobody listens there
    for cluster in (False, True):
        with resolve_precision([trial(tmp_path)], store, cluster=cluster) as (decided,):
            assert decided.config.precision == "bf16" and not ray.is_initialized()


def test_a_checkpoint_that_did_not_note_its_precision_is_told_clearly(tmp_path):
    """Earlier versions wrote `auto`."""
    mine = trial(tmp_path, precision="fp32")
    old = {"digest": trial(tmp_path).config.digest(), "config": {"precision": "auto"}}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / LINEAGE_FILE).write_text(json.dumps(old))
    with pytest.raises(UserError, match="of an earlier version, which did not note in which precision it was trained"):
        mine.is_finished()
    old["config"]["precision"] = "bf16"
    (tmp_path / "m" / LINEAGE_FILE).write_text(json.dumps(old))
    with pytest.raises(UserError, match="holds a checkpoint of other settings"):
        mine.is_finished()
    old["digest"] = mine.config.digest()
    (tmp_path / "m" / LINEAGE_FILE).write_text(json.dumps(old))
    assert mine.is_finished()


def test_unfinished_runs_of_other_settings_are_named(tmp_path):
    mine, store = trial(tmp_path, precision="fp32"), Store(str(tmp_path / "unfinished"))
    assert find_abandoned_runs([mine], store) == []
    for name in (mine.train_run, "train-0123456789ab", "other"):
        store.write(f"{name}/x", b"")
    assert find_abandoned_runs([mine], store) == ["train-0123456789ab"]


def test_a_trial_whose_precision_is_open_is_not_started(tmp_path):
    """Its weights depend on it: at its end it would be taken for one of other settings."""
    with pytest.raises(UserError, match="resolve_precision"):
        run_trials(
            [trial(tmp_path)],
            workers=Workers(),
            storage=Store(str(tmp_path / "s")),
            log=None,
            display=Display(quiet=True),
        )
    assert not (tmp_path / "s").exists() and not ray.is_initialized()

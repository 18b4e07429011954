"""What a trial in Tune's own process keeps, resumes from and hands out. On a real Ray: `tests/e2e/test_trials.py`."""

import pytest
import ray.train
from ray import tune
from ray.train.torch import TorchTrainer

from rayclip.distributed.checkpoints import KeptCheckpoint, export_finished
from rayclip.distributed.train_worker import STARTED, WorkerSettings, train_worker
from rayclip.distributed.trials import Trial
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage
from rayclip.store import Store
from training.test_loop import config


def test_a_trial_that_broke_off_resumes_and_keeps_the_epochs_asked_for(tmp_path, monkeypatch):
    reports, measured = [], []
    monkeypatch.setattr(tune, "report", reports.append)
    store = Store(str(tmp_path / "unfinished"))
    store.write(STARTED, b"")

    def break_off_once(folder, device):
        measured.append(read_lineage(folder)["step"])
        if measured == [2, 4]:
            raise RuntimeError("as if killed")
        return {"score": 1.0}

    def run(trial):
        settings = WorkerSettings(
            trial=trial, log=None, threads=1, notes=trial.notes(store), measure=break_off_once, in_tune="cpu"
        )
        here = ray.train.ScalingConfig(num_workers=0)
        TorchTrainer(train_worker, train_loop_config={"settings": settings}, scaling_config=here).fit()
        assert export_finished(trial, KeptCheckpoint(trial, store).last())
        store.delete_folder(trial.train_run)

    whole = config("tecoa", precision="fp32")  # 3 epochs of 2 steps
    lost, calm = (Trial(name=n, config=whole, out=str(tmp_path / n), keep_epochs=(2, 3)) for n in ("lost", "calm"))
    with pytest.raises(RuntimeError, match="as if killed"):
        run(lost)
    kept = KeptCheckpoint(lost, store)
    assert not export_finished(lost, kept.last()) and not lost.is_finished()
    # Left by an upload of Train's that was killed: not whole, though the lineage is there
    store.write(f"{lost.train_run}/checkpoint_2026-11-28_01-02-03.456789/rayclip.json", b"{}")
    with kept.last().as_directory() as folder:
        assert read_lineage(folder)["step"] == 2
    run(lost)
    run(calm)
    assert measured == [2, 4, 4, 6, 2, 4, 6] and reports[-1]["score"] == 1.0
    assert load_model(lost.model).fingerprint() == load_model(calm.model).fingerprint()
    assert [read_lineage(lost.at_epoch(epoch).root)["step"] for epoch in (2, 3)] == [4, 6]
    assert store.folders() == []

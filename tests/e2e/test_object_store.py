"""A sweep whose checkpoints, unfinished runs and results all live on an object store."""

import pytest
import torch

from calling import run_here
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage
from rayclip.store import Store

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # test_cluster.py trains and evaluates there, too
SMALL = ["--shots", 2, "--epochs", 2, "--batch-size", 10, "--no-tracking", "--quiet"]


def test_training_and_evaluation_on_s3_give_what_a_folder_gives(tmp_path, s3):
    here, there = tmp_path / "m", Store(s3).child("m").root
    for out in (here, there):
        run_here(tmp_path, "train", "--method", "tecoa", "--model", "digits", "--data", "digits", *SMALL, "--out", out)
    assert read_lineage(there) == read_lineage(here)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(*(load_model(f"local-dir:{out}").encode_image(images) for out in (here, there)))
    assert "unfinished" not in Store(there).child(".rayclip").folders(), "emptied"
    again = run_here(
        tmp_path, "train", "--method", "tecoa", "--model", "digits", "--data", "digits", *SMALL, "--out", there
    )
    assert "nothing to do" in again.stdout
    options = ["--data", "digits", "--attacks", "clean,pgd:steps=2", "--eps", "32/255", "--limit", 60, "--quiet"]
    tables = [
        run_here(tmp_path, "eval", "--model", f"local-dir:{out}", *options, "--no-tracking", "--out", f"{place}").stdout
        for out, place in ((here, tmp_path / "r"), (there, Store(s3).child("r").root))
    ]
    numbers = [[line.split()[1:] for line in table.splitlines() if line.startswith("local-dir")] for table in tables]
    assert numbers[0] == numbers[1] != []

"""Two trainings that change nothing, or the same, give models of equal weights."""

import shutil

from calling import run_here
from rayclip import api
from rayclip.attacks import parse_attacks
from rayclip.evaluation import Protocol


def test_a_report_names_all_models_of_equal_weights(saved_clip, tmp_path):
    shutil.copytree(tmp_path / "tiny", tmp_path / "copy")
    labels = {saved_clip: "untouched", f"local-dir:{tmp_path / 'copy'}": "tecoa 1-shot", "digits": "other"}
    wanted = api.Evaluation(data=["digits"], attacks=parse_attacks("clean", {}), protocol=Protocol(), limit=4)
    rows = api.compare("study", labels, [wanted], api.Where(out=str(tmp_path / "r"), cluster=None, quiet=True))
    assert [row.model for row in rows] == list(labels)
    said = run_here(tmp_path, "report", "r", "--format", "csv").stdout
    assert "untouched = tecoa 1-shot," in said and "\nother," in said

"""What the arguments alone show to be wrong is told in under a second, without torch or Ray."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rayclip import names
from rayclip.cli.signatures import collect

SWEEP = str(Path(__file__).parents[2] / "sweeps" / "mmcoa_shots.py")


def test_the_table_of_signatures_is_that_of_the_registries():
    assert json.loads(names.FILE.read_text()) == json.loads(json.dumps(collect())), (
        "run python -m rayclip.cli.signatures"
    )


EVAL = ("eval", "--model", "digits", "--data", "digits", "--out", "r")
RETRIEVAL = ("retrieval", "--model", "digits", "--data", "pairs.parquet", "--out", "r")
TRAIN = ("train", "--method", "tecoa", "--model", "digits", "--data", "digits", "--out", "r")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (EVAL, "attack 'pgd' needs a budget"),
        ((*EVAL, "--attacks", "pgd:eps=1/255,cw"), "attack 'cw' needs a budget"),
        ((*EVAL, "--attacks", "clean,pdg"), "unknown attack 'pdg'"),
        ((*EVAL, "--attacks", "pgd:stepz=3", "--eps", "1/255"), "attack 'pgd' has no setting 'stepz'"),
        ((*EVAL, "--attacks", "pgd:stop=never", "--eps", "1/255"), "use one of first_success, final"),
        ((*EVAL, "--eps", "8"), "write 8/255"),
        ((*EVAL, "--eps", "1/255", "--defense", "ttc:tua=1"), "defence 'ttc' has no setting 'tua'"),
        ((*EVAL, "--eps", "1/255", "--defense", "rn+none"), "unknown defence 'none'"),
        ((*EVAL, "--eps", "1/255", "--scorer", "magic"), "unknown scorer 'magic'"),
        ((*EVAL, "--eps", "1/255", "--model", "local-dir:nowhere"), "there is no folder nowhere"),
        ((*EVAL, "--eps", "1/255", "--model", "mmcoa-5"), "unknown model 'mmcoa-5'"),
        ((*EVAL, "--eps", "1/255", "--data", "no.parquet"), "no.parquet"),
        ((*RETRIEVAL, "--attacks", "fgsm", "--eps", "1/255"), "'fgsm' is for classification"),
        (RETRIEVAL, "no such data file: pairs.parquet"),
        ((*TRAIN, "--method", "tecoo"), "unknown method 'tecoo'"),
        ((*TRAIN, "--data", "no.parquet"), "no.parquet"),
        (("sweep", "--methods", "tecoo"), "unknown method 'tecoo'"),
        (("sweep", "--model", "local-dir:nowhere"), "there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_told_before_torch_is_imported(tmp_path, command, says):
    program = [SWEEP] if command[0] == "sweep" else ["-m", "rayclip", command[0]]
    arguments = list(command[1:])
    for option in ("--model", "--method", "--data"):  # the last one counts here
        while arguments.count(option) > 1:
            del arguments[(at := arguments.index(option)) : at + 2]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2 and len(said) == 1 and says in said[0], said
    assert imported.isdisjoint({"torch", "ray", "open_clip", "transformers"})
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5, "0.3 s on a quiet machine"
    assert list(tmp_path.iterdir()) == []

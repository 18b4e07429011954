"""The Slurm script and the Dockerfile, by the linters of their trades."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.files import CLUSTER, read

BIN = Path(sys.executable).parent


def lint(tool: str, *args: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = BIN / tool if (BIN / tool).exists() else shutil.which(tool)
    assert program, f"{tool} comes with pip install -e '.[test]'"
    return subprocess.run([program, *map(str, args)], input=text, capture_output=True, text=True, check=False)


def test_the_slurm_script_is_sound():
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    found = lint("shellcheck", "--enable=quote-safe-variables,check-set-e-suppressed", "--severity=style", script)
    assert found.returncode == 0, found.stdout
    assert lint("shellcheck", "-", text=read("slurm.sh").replace('"$head"', "$head")).returncode == 1
    assert script.stat().st_mode & 0o111


def test_the_slurm_script_asks_for_a_command():
    done = subprocess.run(["bash", CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_the_slurm_job_makes_its_own_token():
    text = read("slurm.sh")
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN" in text and "secrets.token_hex(32)" in text
    assert text.index("RAY_AUTH_TOKEN=$(") < text.index("ray start")
    assert "--dashboard-host=127.0.0.1" in text


def test_the_dockerfile_is_sound():
    found = lint("hadolint", "--failure-threshold", "style", CLUSTER / "Dockerfile")
    assert found.returncode == 0, found.stdout
    broken = read("Dockerfile").replace(" boto3==1.44.5", " boto3").replace("USER 1000\nWORKDIR", "USER root\nWORKDIR")
    found = lint("hadolint", "-", text=broken)
    assert "DL3013" in found.stdout and "DL3002" in found.stdout


@pytest.mark.parametrize("target", ["rayclip", "mlflow"])
def test_no_image_runs_as_root_or_holds_a_secret(target):
    stage = read("Dockerfile").partition(f"AS {target}\n")[2].partition("\nFROM")[0]
    assert "USER 1000\n" in stage
    assert not any(word in stage for word in ("ARG TOKEN", "PASSWORD=", "SECRET_KEY=", "AWS_"))
    copied = [line for line in stage.splitlines() if line.startswith("COPY")]
    assert copied and not any(line.split()[2] == "." for line in copied), "nothing that lies about by chance"


def test_what_the_image_copies_is_there():
    for line in read("Dockerfile").splitlines():
        if line.startswith("COPY"):
            for source in line.split()[2:-1]:
                assert (CLUSTER.parent / source).exists(), source

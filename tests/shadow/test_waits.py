"""Everything that runs on a GPU runs on a device that refuses to mix with the CPU, gives the CPU's results, and makes
the host wait only at the lines and as often as `waits.json` says. Whoever adds or removes a wait writes the table anew
(`shadow.run`), and its difference shows what changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as backends

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "waits.json").read_text())

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        not hasattr(backends, "_setup_privateuseone_for_python_backend"),
        reason="this PyTorch knows no devices that are written in Python",
    ),
]


def python(*arguments: str) -> str:
    """What a process of its own prints: the device changes PyTorch for the whole process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    return subprocess.run([sys.executable, *arguments], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    return json.loads(python(str(HERE / "run.py")))


def test_the_table_has_a_row_for_everything(outcomes):
    assert list(outcomes) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_the_host_waits_only_where_the_table_says(outcomes, name):
    assert "error" not in outcomes[name], outcomes[name]["error"]
    assert outcomes[name]["waits"] == TABLE[name]


PROBE = """
import torch
from shadow.device import DEVICE, NAME
def waits(do):
    DEVICE.waits.clear()
    try:
        do()
    except (RuntimeError, TypeError):
        return -1
    return sum(DEVICE.waits.values())
with DEVICE:
    x, on_cpu, places, mask = torch.arange(4.0).to(NAME), torch.ones(4), torch.arange(2), torch.ones(4) > 0
    there, mask = places.to(NAME), mask.to(NAME)
    print([waits(do) for do in (
        lambda: x + on_cpu, lambda: x.numpy(), lambda: torch.cat([x, on_cpu]),
        lambda: x + 1, lambda: x[there], lambda: torch.where(mask, x, 0), lambda: on_cpu.to(NAME, non_blocking=True),
        lambda: x.masked_fill_(mask, 0),
        lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: on_cpu.to(NAME), lambda: x[places],
        lambda: x[mask], lambda: mask.nonzero(), lambda: bool(mask.any()), lambda: x.unique(),
    )])
"""


def test_the_device_refuses_to_mix_and_counts():
    assert json.loads(python("-c", PROBE)) == [-1] * 3 + [0] * 5 + [1] * 9

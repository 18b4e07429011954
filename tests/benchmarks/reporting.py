"""How long does a report of many models take, and how much memory? Prints both; not a test, since rates depend on the
machine.

    python tests/benchmarks/reporting.py [--models 100 --datasets 16 --attacks 8 --samples 10000 --shard-size 256]

Writes result files as an evaluation would (columns, types and shards of the real ones, verdicts at random but for a
strength of each model), then runs `rayclip report --format html`, `--format csv` and `rayclip leaderboard` on them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rayclip.store import Store

METHODS = ("tecoa", "mmcoa", "fare", "pmg-aft", "tga-zsr")
KINDS = (
    ("clean", None, {}),
    ("pgd-10_eps1", "1/255", {"attack": "pgd", "steps": 10, "step": "1/255", "norm": "linf", "stop": "first_success"}),
    ("bert", None, {"attack": "bert", "substitutes": "bert-base-uncased", "k": 10, "changes": 1}),
    ("sep_pgd-10_eps1", "1/255", {"attack": "sep", "steps": 10, "norm": "linf", "substitutes": "bert-base-uncased"}),
    ("cw-10_eps1", "1/255", {"attack": "cw", "steps": 10, "step": "1/255", "norm": "linf"}),
    ("autoattack_eps1", "1/255", {"attack": "autoattack", "norm": "linf"}),
    ("pgd-10_eps4", "4/255", {"attack": "pgd", "steps": 10, "step": "1/255", "norm": "linf", "stop": "first_success"}),
    ("co-attack_eps1", "1/255", {"attack": "co-attack", "steps": 10, "substitutes": "bert-base-uncased"}),
)


def write_results(root: Path, models: int, datasets: int, attacks: int, samples: int, shard_size: int) -> int:
    """Result files of every model × data set × attack; returns how many cells."""
    store, cells = Store(str(root)), 0
    for m in range(models):
        random = np.random.default_rng(m)
        fingerprint, method = f"{m:016x}", METHODS[m % len(METHODS)]
        lineage = {
            "data": {"name": "imagenet"},
            "config": {"shots": (1, 5, 50, None)[m % 4], "method": {"name": method}},
        }
        model = {"model": f"local-dir:/models/{m}", "label": f"{method} {m}", "lineage": lineage if m else None}
        store.write_json(f"lineage/{fingerprint}.json", model)
        for d in range(datasets):
            label = np.random.default_rng(d).integers(0, 100, samples)
            clean = np.where(random.random(samples) < 0.7, label, random.integers(0, 100, samples))
            for a in range(attacks):
                cell = f"{m:05x}{d:05x}{a:06x}"
                survives = random.random(samples) < (1.0 if a == 0 else 0.1 + 0.6 * m / models)
                adversarial = np.where(survives, clean, random.integers(0, 100, samples))
                columns = {
                    "position": np.arange(samples),
                    "sample_id": np.arange(samples),
                    "label": label,
                    "clean_pred": clean,
                    "adv_pred": adversarial,
                    "clean_margin": random.normal(size=samples).astype(np.float32),
                    "adv_margin": random.normal(size=samples).astype(np.float32),
                    "steps": random.integers(0, 10, samples),
                    "queries": random.integers(0, 10, samples),
                    "linf": random.random(samples).astype(np.float32),
                    "l2": random.random(samples).astype(np.float32),
                }
                store.write_json(f"cells/{cell}/cell.json", record(m, fingerprint, d, a))
                for first in range(0, samples, shard_size):
                    part = {name: column[first : first + shard_size] for name, column in columns.items()}
                    store.write_table(f"cells/{cell}/{first:08d}.parquet", part)
                cells += 1
    return cells


def record(model: int, fingerprint: str, dataset: int, attack: int) -> dict:
    name, eps, settings = KINDS[attack]
    shared = {"seed": 0, "resolution": "model", "class_names": "curated", "template": "This is a photo of a {}"}
    return {
        "model": f"local-dir:/models/{model}",
        "model_fingerprint": fingerprint,
        "data": f"set{dataset}",
        "dataset": f"set{dataset}",
        "data_fingerprint": f"{dataset:016x}",
        "class_names": [f"class {i}" for i in range(100)],
        "attack_label": name,
        "defense_label": "none",
        "scorer_label": "template",
        "protocol": {"attack": "clean", **({"eps": eps} if eps else {}), **settings, **shared}
        | {"scorer": "template", "defense": "none", "precision": "fp32", "protocol": 2},
    }


def measure(*command: str) -> tuple[float, float]:
    """Seconds, and the peak of the memory in GB."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "rayclip", *command], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"rayclip {' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("models", 100), ("datasets", 16), ("attacks", 8), ("samples", 10_000), ("shard-size", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--results", type=Path, help="keep the result files there, and use those that are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.results or Path(folder) / "results"
        if not (root / "cells").is_dir():
            began = time.perf_counter()
            cells = write_results(root, args.models, args.datasets, args.attacks, args.samples, args.shard_size)
            print(f"wrote {cells:,} cells in {time.perf_counter() - began:.0f} s")
        for what, *command in (
            ("report, html", "report", str(root), "--out", f"{folder}/report.html", "--quiet"),
            ("report, csv", "report", str(root), "--out", f"{folder}/report.csv", "--quiet"),
            ("leaderboard", "leaderboard", str(root), "--out", f"{folder}/board", "--quiet"),
        ):
            seconds, memory = measure(*command)
            print(f"{what}: {seconds:.0f} s, {memory:.2f} GB")


if __name__ == "__main__":
    main()

"""How long a trial takes to its first step on a Ray that is up, and where processor time goes meanwhile.

    python tests/benchmarks/starting.py [--workers 2]

Two trials of one step each run one after the other: the first starts its processes, the second may find them. Prints
seconds by the clock from the call to a trial's first report and from then to its end, and the processes that Ray had
for them with their processor time. One worker trains in Tune's own process, several are Ray Train's.
"""

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import ray

from rayclip.data import open_data
from rayclip.distributed.connect import ray_cluster
from rayclip.distributed.trials import Trial, Workers
from rayclip.distributed.tuning import run_trials
from rayclip.methods import make_method
from rayclip.models import load_model
from rayclip.progress import Display
from rayclip.store import Store
from rayclip.training import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    count = parser.parse_args().workers
    load_model("digits"), open_data("digits", "train")  # a driver has checked them before it trains
    method = make_method("tecoa", eps=32 / 255, steps=1)
    config = TrainConfig(
        model="digits", data="digits", method=method, recipe=replace(method.small, epochs=1), shots=1, precision="fp32"
    )
    with ray_cluster(), tempfile.TemporaryDirectory() as place:
        ray.get(ray.remote(lambda: None).remote())
        family, began, marks = Family(), time.monotonic(), []
        trials = [Trial(name=str(seed), config=replace(config, seed=seed), out=f"{place}/{seed}") for seed in (0, 1)]
        run_trials(
            trials,
            workers=Workers(count=count, cpus=ray.cluster_resources()["CPU"] / count - 0.1),  # one trial at a time
            storage=Store(f"{place}/unfinished"),
            log=None,
            display=Display(quiet=True),
            on_report=lambda: marks.append(time.monotonic() - began) or family.look(),
            on_finish=lambda trial, error: marks.append(time.monotonic() - began) or family.look(),
        )
        assert len(list(Path(place).glob("*/rayclip.json"))) == len(trials)
    # Each trial marks its only report and its end
    first, first_end, second, *_ = marks
    print(
        f"{count} worker{'s' * (count > 1)}: first report {first:.1f} s after the call, then {first_end - first:.1f} s"
    )
    print(f"the next trial: first report {second - first_end:.1f} s after the end of the one before")
    for title, seconds in family.seconds().most_common():
        print(f"{seconds:8.1f} s of a core  {title}")


class Family:
    """The processes that Ray has started since, by title, and their processor time when they were last seen."""

    def __init__(self) -> None:
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}
        self._seen: dict[int, tuple[str, float]] = {}

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid not in self._before:
                try:
                    times, title = process.cpu_times(), " ".join(process.cmdline())
                except psutil.Error:
                    continue
                named = title if title.startswith("ray::") else self._seen.get(process.pid, ("another",))[0]
                self._seen[process.pid] = named.split()[0].partition(".")[0], times.user + times.system

    def seconds(self) -> Counter[str]:
        found: Counter[str] = Counter()
        number = Counter(title for title, _ in self._seen.values())
        for title, seconds in self._seen.values():
            found[f"{number[title]} × {title}"] += seconds
        return found


if __name__ == "__main__":
    main()

"""One evaluation by our pool of actors, and by `ray.data.map_batches` with an actor pool of the same size.

    OMP_NUM_THREADS=1 python tests/benchmarks/ray_data.py [--images 445] [--steps 100] [--workers 2]

Each is a new process with a private Ray of as many CPUs, and evaluates the same cells (clean, PGD, and PGD with twice
the steps) with the same `Evaluator` in shards of the same size; the time is from an empty folder to the last verdict,
Ray's own start excluded. Then the verdicts of both are compared sample by sample. Ray Data gets what the pool gets: one
row a shard, actors that keep the model loaded, and one shard at a time for each, so that slow shards do not queue
behind each other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.distributed.evaluating import evaluate
from rayclip.distributed.resources import PoolSize
from rayclip.evaluation import Cell, Evaluator, Protocol, Shards, Store, chosen_positions, make_cells, outstanding
from rayclip.models import load_model
from rayclip.progress import Display
from rayclip.units import parse_budget

COLUMNS = ["position", "sample_id", "label", "clean_pred", "adv_pred", "steps"]


class EvaluateShards:
    """A callable of Ray Data: rows in, rows out."""

    def __init__(self, folder: str, work: list[Shards]) -> None:
        self._evaluator, self._work = Evaluator(Store(folder)), work

    def __call__(self, batch: dict) -> dict:
        right = []
        for cell, number in zip(batch["cell"], batch["number"], strict=True):
            right.append(self._evaluator.run(self._work[cell][number]).right)
        return {"right": right}


def run_pool(work: list[Shards], folder: str, workers: int, shard: int) -> None:
    size = PoolSize(workers=workers, shard_size=shard)
    total = sum(len(shards.positions) for shards in work)
    evaluate(work, Store(folder), size=size, display=Display(quiet=True), total=total)


def run_ray_data(work: list[Shards], folder: str, workers: int, shard: int) -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    shards = [{"cell": cell, "number": number} for cell, found in enumerate(work) for number in range(len(found))]
    rows = ray.data.from_items(shards, override_num_blocks=len(shards))
    rows.map_batches(
        EvaluateShards,
        fn_constructor_args=(folder, work),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
    ).materialize()


RUNS = {"our pool": run_pool, "Ray Data": run_ray_data}


def cells_of(args: argparse.Namespace) -> tuple[list[Cell], dict]:
    data = open_data(args.data, "test")
    attacks = f"clean,pgd:stop=final,pgd:stop=final,steps={2 * args.steps}"
    cells = make_cells(
        [(args.model, load_model(args.model).fingerprint())],
        [(args.data, data)],
        parse_attacks(attacks, {"steps": args.steps, "step": args.eps / 16}),
        Protocol(eps=args.eps),
    )
    return cells, {args.data: chosen_positions(len(data), args.images)}


def time_one(args: argparse.Namespace) -> None:
    """In a process of its own: print the seconds and the seconds of a second evaluation in the same Ray."""
    cells, positions = cells_of(args)
    ray.init(address="local", num_cpus=args.workers, include_dashboard=False, log_to_driver=False)
    seconds = []
    for attempt in range(2):
        folder = f"{args.only_in}/{attempt}"
        work = outstanding(cells, positions, Store(folder), args.shard_size)
        began = time.monotonic()
        RUNS[args.only](work, folder, args.workers, args.shard_size)
        seconds.append(time.monotonic() - began)
    ray.shutdown()
    print(json.dumps(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--eps", type=parse_budget, default=32 / 255)
    parser.add_argument("--images", type=int, default=445)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--only-in", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        time_one(args)
        return
    cells, _ = cells_of(args)
    print("by          first   second evaluation in one Ray, in seconds")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in RUNS:
                command = [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--only",
                    name,
                    "--only-in",
                    f"{folder}/{number}-{name}",
                ]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                first, second = json.loads(done.stdout.splitlines()[-1])
                print(f"{name:<10} {first:6.1f}   {second:6.1f}")
        ours, theirs = (Store(str(Path(folder) / f"0-{name}" / "0")) for name in RUNS)
        for cell in cells:
            one, other = (
                store.read_tables(store.names(f"cells/{cell.id}", ".parquet")).sort_by("position").select(COLUMNS)
                for store in (ours, theirs)
            )
            assert one.equals(other), f"verdicts differ under {cell.attack_label}"
    print("all verdicts are the same")


if __name__ == "__main__":
    main()

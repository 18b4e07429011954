"""Evaluation workers on a warm Ray: what a second one adds, and how long the first shard waits.

    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py [--images 445] [--steps 100]
    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py --model local-dir:POCKET_CLIP --data cifar10-test.parquet \
        --eps 1/255 --images 128 --steps 50

The same cells are evaluated by one worker with one thread, and by two with one thread each, into empty folders. Each
time Ray is there first, and an evaluation of the clean cell warms the file caches. The rate counts samples from
the first shard's start to the last one's end, the loading of models and data included; the wait is from submission to
the first shard's start, worker processes and their imports included.
"""

import argparse
import tempfile

import ray

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.distributed.evaluating import PoolStatistics, evaluate
from rayclip.distributed.resources import PoolSize
from rayclip.evaluation import Cell, Protocol, Store, chosen_positions, make_cells, outstanding
from rayclip.models import load_model
from rayclip.progress import Display
from rayclip.units import parse_budget

WANTED = 1.8  # times the rate of one
WAIT_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--eps", type=parse_budget, default=32 / 255)
    parser.add_argument("--images", type=int, default=445)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = open_data(args.data, "test")
    attacks = f"clean,pgd:stop=final,pgd:stop=final,steps={2 * args.steps}"
    cells = make_cells(
        [(args.model, load_model(args.model).fingerprint())],
        [(args.data, data)],
        parse_attacks(attacks, {"steps": args.steps, "step": args.eps / 16}),
        Protocol(eps=args.eps),
    )
    positions = {args.data: chosen_positions(len(data), args.images)}
    total = len(cells) * len(positions[args.data])

    def go(cells: list[Cell]) -> PoolStatistics:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            work = outstanding(cells, positions, store, 256)
            return evaluate(work, store, size=PoolSize(), display=Display(quiet=True), total=total)

    print("workers  samples/s  until the first shard")
    best = {}
    for workers in (1, 2):
        ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        go(cells[:1])
        for _ in range(args.rounds):
            ran = go(cells)
            rate = total / (ran.wall - ran.waited)
            best[workers] = max(best.get(workers, 0.0), rate)
            print(
                f"{workers:<8} {rate:9.1f}  {ran.waited:.2f} s, then {ran.loading / workers:.2f} s for model and data"
            )
        ray.shutdown()
    print(
        f"two workers: {best[2] / best[1]:.2f} times one's rate (wanted: {WANTED}); wait wanted: under {WAIT_S:.0f} s"
    )


if __name__ == "__main__":
    main()

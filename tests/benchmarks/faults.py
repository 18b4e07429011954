"""Many rounds of faults at random times on a local cluster, with a table of what came of them.

    python tests/benchmarks/faults.py --rounds 60

Each round kills something (SIGKILL) or fills a disk in the middle of a real evaluation or training run, on a head and
three nodes with token authentication and an MLflow server on PostgreSQL, and compares the end with an undisturbed run:
verdicts sample by sample, weights, and the metrics in MLflow step by step. Needs root for the small disk.
"""

import argparse
import collections
import signal
import statistics
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.faults import KINDS, Faults, Outcome
from e2e.local_cluster import local_cluster
from e2e.mlflow_server import mlflow_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started
    kinds = args.kinds.split(",")
    outcomes, wrong = collections.defaultdict(list), Counter()
    try:
        run(args, kinds, outcomes, wrong)
    finally:  # also of what is cut off
        show(kinds, outcomes, wrong)


def run(args: argparse.Namespace, kinds: list[str], outcomes: dict[str, list[Outcome]], wrong: Counter[str]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="rayclip-faults-") as place,
        mlflow_server(Path(place)) as server,
        local_cluster(args.nodes) as cluster,
    ):
        faults = Faults(cluster, server, Path(place), args.seed)
        print(f"undisturbed: evaluation {faults.eval_s:.0f} s at work, training {faults.train_s:.0f} s", flush=True)
        for number in range(args.rounds):
            kind = kinds[number % len(kinds)]
            try:
                outcome = faults.round(kind)
            except Exception:
                wrong[kind] += 1
                print(f"{number:3d} {kind}: WRONG\n{traceback.format_exc()}", flush=True)
                continue
            outcomes[kind].append(outcome)
            when = "after the end" if outcome.after is None else f"at {outcome.after:.1f} s"
            again = f", given again ({outcome.said})" if outcome.again else ""
            print(f"{number:3d} {kind}: {when}, equal after {outcome.seconds:.0f} s{again}", flush=True)


def show(kinds: list[str], outcomes: dict[str, list[Outcome]], wrong: Counter[str]) -> None:
    print("| fault | rounds | in the middle | finished by itself | command given again | wrong | median s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        mine = outcomes[kind]
        again = sum(o.again for o in mine)
        middle = sum(o.after is not None for o in mine)
        median = statistics.median([o.seconds for o in mine]) if mine else float("nan")
        rounds = len(mine) + wrong[kind]
        print(f"| {kind} | {rounds} | {middle} | {len(mine) - again} | {again} | {wrong[kind]} | {median:.0f} |")


if __name__ == "__main__":
    main()

"""Many rounds of faults at random times on a local cluster, with a table of what came of them.

    python tests/benchmarks/faults.py --rounds 60
    python tests/benchmarks/faults.py --rounds 100 --kinds all --draw --history tests/e2e/fault_history.jsonl

Each round breaks something in the middle of a real evaluation or training run: it kills (SIGKILL) or stops (SIGSTOP) a
process, fills a disk, takes memory, pulls a node's cable, spoils the object store's answers or moves a clock. It runs
on a head and two or three nodes with token authentication and an MLflow server on PostgreSQL, and compares the end with
an undisturbed run: verdicts sample by sample, weights, and the metrics in MLflow step by step.

Needs root for small disks and for hosts (network namespaces, in a network of this program's own); a clock needs
`faketime`. Ends with 1 if anything was lost or unequal, or could not be tried.
"""

import argparse
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pyarrow import fs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.faults import KINDS, NETWORK_KINDS, Faults, Outcome, cluster_env
from e2e.hosts import enter_network, start_network
from e2e.local_cluster import local_cluster
from e2e.mlflow_server import mlflow_server
from servers import ObjectStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS), help="commas between, or: all, network")
    parser.add_argument("--draw", action="store_true", help="in random order, each once before any comes again")
    parser.add_argument("--history", type=Path, help="append a line for each round to this file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    groups = {"all": [*KINDS, *NETWORK_KINDS], "network": [*NETWORK_KINDS]}
    kinds = groups.get(args.kinds) or args.kinds.split(",")
    on_hosts = any(part in NETWORK_KINDS for kind in kinds for part in kind.split("+"))
    if on_hosts:
        enter_network()
        start_network()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started
    outcomes, wrong = collections.defaultdict(list), Counter()
    try:
        run(args, kinds, outcomes, wrong, on_hosts)
    finally:  # also of what is cut off
        show(kinds, outcomes, wrong)
    sys.exit(any(wrong.values()))


def run(
    args: argparse.Namespace,
    kinds: list[str],
    outcomes: dict[str, list[Outcome]],
    wrong: Counter[str],
    on_hosts: bool,
) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayclip-faults-")))
        server = stack.enter_context(mlflow_server(place))
        store = None
        if on_hosts:
            os.environ.update(ObjectStore.env)  # for this program, too, which looks there
            (place / "store").mkdir()
            store = ObjectStore(place / "store")
            stack.callback(store.kill)
            store.start()
            fs.FileSystem.from_uri(store.place(""))[0].create_dir("bucket")
        cluster = stack.enter_context(
            local_cluster(args.nodes, cluster_env(place) if on_hosts else None, own_hosts=on_hosts)
        )
        faults = Faults(cluster, server, place, args.seed, store=store)
        print(f"undisturbed: evaluation {faults.eval_s:.0f} s at work, training {faults.train_s:.0f} s", flush=True)
        for number, kind in enumerate(chosen(kinds, args)):
            about = {"kind": kind, "nodes": args.nodes, "seed": args.seed, "round": number, "commit": commit}
            try:
                outcome = faults.round(kind)
            except Exception:
                wrong[kind] += 1
                error = traceback.format_exc()
                print(f"{number:3d} {kind}: WRONG\n{error}", flush=True)
                note(args.history, about | {"equal": False, "said": error.strip().splitlines()[-1][:300]})
                continue
            outcomes[kind].append(outcome)
            when = "after the end" if outcome.after is None else f"at {outcome.after:.1f} s"
            again = f", given again ({outcome.said})" if outcome.again else ""
            print(f"{number:3d} {kind}: {when}, equal after {outcome.seconds:.0f} s{again}", flush=True)
            found = {
                "equal": True,
                "seconds": round(outcome.seconds, 1),
                "after": outcome.after and round(outcome.after, 1),
            }
            note(args.history, about | found | {"again": outcome.again, "said": outcome.said})


def chosen(kinds: list[str], args: argparse.Namespace) -> Iterator[str]:
    draw, left = random.Random(args.seed), []
    for _ in range(args.rounds):
        if not left:
            left = draw.sample(kinds, len(kinds)) if args.draw else kinds.copy()
        yield left.pop(0)


def note(history: Path | None, line: dict[str, object]) -> None:
    if history:
        with history.open("a") as file:
            file.write(json.dumps(line) + "\n")


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

"""The referee's golden file from the results of its sweep on the digits, three seeds.

python sweeps/referee.py --limit 60 --seeds 3 --out runs/referee
python tests/benchmarks/referee.py runs/referee --out tests/golden/referee_digits.json
"""

import argparse
import json
from pathlib import Path

import numpy as np

from rayclip.reports.results import read_results
from rayclip.reports.verdicts import align


def golden(place: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Verdicts of the untouched model: defence -> attack -> a hexadecimal number per seed, a bit per image, the first
    image its highest."""
    cells = [cell for cell in read_results([place]).cells if cell.model.spec == "digits"]
    _, rights = align([cell.verdicts for cell in cells])
    found: dict[str, dict[str, dict[int, str]]] = {}
    for cell, right_N in zip(cells, rights, strict=True):
        attacks = found.setdefault(cell.defense, {}).setdefault(cell.attack, {})
        attacks[cell.protocol["seed"]] = np.packbits(right_N).tobytes().hex()
    return {d: {a: [s[seed] for seed in sorted(s)] for a, s in sorted(at.items())} for d, at in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = []
    for defense, attacks in golden(args.results).items():
        rows = ",\n".join(f"  {json.dumps(attack)}: {json.dumps(seeds)}" for attack, seeds in attacks.items())
        lines.append(f" {json.dumps(defense)}: {{\n{rows}\n }}")
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

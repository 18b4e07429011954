"""How many captions per class does SAFT need?  SAFT's ablation of their number.

    python sweeps/saft_captions.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/saft_captions.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --captions T.csv
    ray job submit --working-dir . -- python sweeps/saft_captions.py --scale paper --captions TABLE

Cost: `digits` 4 minutes of processor time. `paper` has not been run by us: as many trainings of SAFT
on TinyImageNet as there are numbers of captions, and as many models attacked on 16 data sets.

To expect at the scale `paper`: our source (SAFT's summary, arXiv 2602.12461) prints no numbers. M = 5 is the paper's
choice.
"""

from typing import Annotated

import typer

from rayclip.cli.scales import zero_shot
from rayclip.cli.sweep import Run, split, start, sweep
from rayclip.types import UserError

SETS = ["1,3,5"]


@sweep("saft-captions", omit=["methods"], every={"shots": "full"}, paper=zero_shot)
def main(
    run: Run,
    sets: Annotated[list[str], typer.Option(metavar="N,N…", help="Captions of each class, commas between.")] = SETS,
    captions: Annotated[
        str | None, typer.Option(help="Table of captions, or templates.  [default: the bundled one for digits]")
    ] = None,
) -> None:
    """Fine-tune with SAFT on each number of captions, and attack the results."""
    counts = split(sets)
    if not all(count.isascii() and count.isdigit() and int(count) for count in counts):
        raise UserError(f"--sets {','.join(sets)} holds something else than numbers from 1 on: write 1,3,5.")
    trials = [run.trial(f"saft M={n}", run.method("saft", captions=captions, sets=int(n))) for n in counts]
    run.go(trials, run.evaluations("clean,pgd,cw"))


if __name__ == "__main__":
    start(main)

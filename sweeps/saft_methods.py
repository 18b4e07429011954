"""Which method is most robust on unseen data sets?  SAFT's main table: methods × 16 data sets × 3 attacks.

    python sweeps/saft_methods.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/saft_methods.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/saft_methods.py --scale paper --captions TABLE

Cost: `digits` 12 minutes of processor time, 6 on two cores. `paper` has not been run by us: six trainings of ten
epochs on TinyImageNet and seven models attacked on 16 data sets, by PGD-100, CW-100 and AutoAttack (APGD-CE and APGD-
DLR).

To expect at the scale `paper`: our source (SAFT's summary, arXiv 2602.12461) prints no table. It claims substantial
gains over the other methods in robust accuracy, on average over the 16 data sets.
"""

from typing import Annotated

import typer

from rayclip.cli.scales import ZERO_SHOT_METHODS, zero_shot
from rayclip.cli.sweep import Run, start, sweep


@sweep("saft-methods", methods=ZERO_SHOT_METHODS, every={"shots": "full"}, paper=zero_shot)
def main(
    run: Run,
    captions: Annotated[
        str | None, typer.Option(help="saft's table of captions.  [default: the bundled one for digits]")
    ] = None,
) -> None:
    """Fine-tune with each method, and attack on every data set with PGD, CW and AutoAttack."""
    run.go(run.image_trials(captions=captions), run.evaluations("clean,pgd,cw,autoattack-seeds"))


if __name__ == "__main__":
    start(main)

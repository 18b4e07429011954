"""Is it enough to fine-tune the image encoder?  MMCoA's figure 5.

    python sweeps/mmcoa_partial.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_partial.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_partial.py --scale paper

Cost: `digits` 9 minutes of processor time, 5 on two cores. `paper` has not been run by us: twice the rows of those
methods in `mmcoa_shots.py`, whose full fine-tuning `--models` shares.

To expect at the scale `paper`: the figure prints no numbers. The paper reads from it that accuracy under the multimodal
attack grows with the number of trained parameters.
"""

from typing import Annotated

import typer

from rayclip.cli.sweep import Run, split, start, sweep

PARTS = {"all": "whole"}

CHOSEN = ["image,all"]


@sweep("mmcoa-partial", methods="tecoa,mmcoa", every={"shots": "5,full"})
def main(
    run: Run,
    parts: Annotated[
        list[str],
        typer.Option(
            metavar="PARTS", help="What is trained: all, image (its encoder), last-N (blocks of it), commas between."
        ),
    ] = CHOSEN,
) -> None:
    """Fine-tune the image encoder alone and the whole model, and attack the results."""
    trials = [
        run.trial(f"{label} {PARTS.get(part, part)}", run.method(name, trains=part), shots=shots)
        for label, name, shots in run.grid()
        for part in split(parts)
    ]
    run.go(trials, run.evaluations("clean,pgd,bert,sep"))


if __name__ == "__main__":
    start(main)

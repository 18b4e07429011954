"""How much clean accuracy does each point of robustness cost?  MMCoA's figure 8: weights between two models.

    python sweeps/mmcoa_interpolation.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_interpolation.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_interpolation.py --scale paper

Cost: `digits` 4 minutes of processor time. `paper` has not been run by us: the full-shot rows of
`mmcoa_shots.py` (which `--models` shares), attacked at as many points as there are values of a. `rayclip interpolate`
does the same with two models that are there.

To expect at the scale `paper`: the figure prints no numbers. The paper reads from it a trade-off under image and
multimodal attacks, on which MMCoA has the best balance, and a decline of both accuracies under the text attack. The
ends are the rows of tables II and III: untouched 4.64 multimodal and 63.05 clean, MMCoA 22.00 and 54.62.
"""

from typing import Annotated

import typer

from rayclip.cli.models import mixes
from rayclip.cli.sweep import Run, start, sweep

SHARES = ["0.25,0.5,0.75,1"]


@sweep("mmcoa-interpolation", methods="tecoa,mmcoa", every={"shots": "full"})
def main(
    run: Run,
    a: Annotated[
        list[str], typer.Option("--a", metavar="A,A…", help="Numbers from 0 (untouched) to 1, commas between.")
    ] = SHARES,
) -> None:
    """Fine-tune, and attack models with the weights (1-a)·untouched + a·fine-tuned."""
    shares = ",".join(a)
    mixes(run.model, run.model, shares)
    run.go(
        run.trials(),
        run.evaluations("clean,pgd,bert,sep"),
        results=lambda trial: mixes(run.model, trial.model, shares, trial.name),
    )


if __name__ == "__main__":
    start(main)

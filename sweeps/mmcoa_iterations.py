"""How many epochs of training are needed?  MMCoA's figure 7.

    python sweeps/mmcoa_iterations.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_iterations.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_iterations.py --scale paper

Cost: `digits` 3 minutes of processor time. `paper` has not been run by us: the 50-shot runs of TeCoA and MMCoA,
and 17 models attacked on 15 data sets.

To expect at the scale `paper`: the figure prints no numbers. The paper trains TeCoA for 10 epochs and evaluates after
each, MMCoA for 28 and evaluates after every fourth; accuracy under image and multimodal attacks rises and then stays,
under the text attack and clean it falls and then stays. Table II has 15.00 (TeCoA) and 18.46 (MMCoA) multimodal at 50
shots.
"""

from typing import Annotated

import typer

from rayclip.cli.sweep import Run, start, sweep

PAPER = {"tecoa": 1, "mmcoa": 4}  # epochs between evaluations, out of 10 and 28


@sweep("mmcoa-iterations", methods="tecoa,mmcoa", every={"shots": "5"}, paper={"shots": "50"})
def main(
    run: Run,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs between two looks.  [default: a fifth of all, or the paper's]"),
    ] = None,
) -> None:
    """Fine-tune with each method, and attack the checkpoint after every few epochs."""
    trials = []
    for label, name, shots in run.grid():
        usual = PAPER.get(name) if run.is_paper else None
        trials.append(run.looked_at(run.trial(label, run.method(name), shots=shots), every or usual))
    run.go(
        trials,
        run.evaluations("clean,pgd,bert,sep"),
        results=lambda trial: {trial.model_at(epoch): f"{trial.name} epoch {epoch}" for epoch in trial.keep_epochs},
    )


if __name__ == "__main__":
    start(main)

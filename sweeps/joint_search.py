"""Which budget, loss weights, shots and learning rate give the best clean and robust accuracy together?

    python sweeps/joint_search.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/joint_search.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/joint_search.py --scale paper

Samples trials at random, evaluates each after every epoch on a fifth of the training data that is held out of all
training, lets ASHA stop the worst ones, and attacks the Pareto front of the others on the test data.

Cost: `digits` 5 minutes of processor time. `paper` has not been run by us: 64 samples (`--samples`)
are about twice the training of `mmcoa_shots.py`, since two of three stop at each rung.

To expect at the scale `paper`: nobody has published such a search. The papers' own point (1/255 in training, λ = 0.5
each, all shots, 1e-6) has 22.00 % multimodal and 54.62 % clean; the untouched model 4.64 and 63.05 (tables II, III).
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer

from rayclip.cli.sweep import Run, spell, start, sweep
from rayclip.types import UserError


@sweep("joint-search", methods="mmcoa")
def main(
    run: Run,
    samples: Annotated[int, typer.Option(min=2, help="Trials.")] = 8,
    reduction: Annotated[
        float, typer.Option(help="One trial in this many passes each rung: after 1 epoch, this many, its square, …")
    ] = 3.0,
) -> None:
    """Search eps, loss weights, shots and learning rate jointly for clean and robust accuracy."""
    from rayclip.distributed.search import Validation

    if not reduction > 1:
        raise UserError(f"--reduction {reduction:g} must be more than 1: 3 lets a third of the trials pass each rung.")
    data = f"{run.data[0]}#validation"
    trials = []
    for draw in draws(run, samples):
        method = run.method(draw.pop("method"), draw.pop("weights"), **draw.pop("settings"))
        trial = run.trial(draw.pop("label"), method, data=data, **draw)
        trials.append(dataclasses.replace(trial, config=dataclasses.replace(trial.config, save_every_epochs=1)))
    (chosen,) = run.evaluations("clean,sep", tests=[data])
    validation = Validation(data=data, attacks=chosen.attacks, protocol=chosen.protocol, limit=run.options.limit)
    run.search(trials, validation, run.evaluations("clean,pgd,bert,sep"), reduction=reduction)


def draws(run: Run, samples: int) -> Iterator[dict[str, Any]]:
    """Yield the trials' settings: equal for equal seeds, and a longer search starts with those of a shorter one."""
    rng = np.random.default_rng(run.options.seed)
    for number in range(samples):
        eps, weight, rate, shots, method = rng.random(5)
        factor = float(np.round(2 ** (2 * eps - 1), 2))  # 1/2 to 2, log-uniform
        share = float(np.round(0.1 + 0.8 * weight, 2))  # λ_img = share, λ_txt = 1 - share
        chosen = run.methods[int(method * len(run.methods))]
        base = run.recipe(run.method(chosen)).lr
        lr = float(f"{base * 10 ** (rate - 0.5):.2g}")  # a third to three times the recipe's, log-uniform
        count = run.shots[int(shots * len(run.shots))]
        budget = factor * run.setting.eps
        yield {
            "label": f"{number:02d} {chosen} eps×{factor:g} λ {share:g} {spell(count)} lr {lr:g}",
            "method": chosen,
            "settings": {
                "eps": budget,
                "step": run.step(budget),
            },
            "weights": {"lambda_img": share, "lambda_txt": round(1 - share, 2)},
            "shots": count,
            "recipe": {"lr": lr},
        }


if __name__ == "__main__":
    start(main)

"""Which training method is worth its compute?  All methods, each with as many steps as the same compute pays.

    python sweeps/methods_board.py                    # bundled digits: minutes on two cores, no downloads
    python sweeps/methods_board.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/methods_board.py --scale paper

One table and one figure, `methods_board.md` and `.svg` in the results: compute, steps and seconds of each training,
clean and robust accuracy with intervals, and the difference to TeCoA.

Compute is counted: small steps of each training are run, and the floating-point operations of both encoders,
forward and backward, in attack, loss and original model are added up. Its unit is the forward pass of one image.
The budget is what TeCoA's recipe takes at that scale: 5 epochs of digits, 4 at `pocket`, the paper's 10 epochs of
TinyImageNet.

Cost: `digits` about 20 minutes of processor time, by an estimate from some of the methods. `paper` has not been run
by us: a training of each method, of the compute of ten epochs of TeCoA, attacked by PGD-10 and AutoAttack (APGD-CE
and APGD-DLR) on 16 data sets.

To expect at the scale `paper`: no paper compares methods at equal compute. A step of FARE takes 1.1 times that of
TeCoA, one of PMG-AFT, TGA-ZSR, LORE and Sim-CLIP 1.4 times, and FT-standard's a third.
"""

from typing import Annotated, Any

import typer

from rayclip.cli.scales import ttc_protocol
from rayclip.cli.sweep import Run, start, sweep
from rayclip.names import METHODS

BASELINE = "tecoa"
ATTACKS = "clean,pgd,autoattack-seeds"


@sweep("methods-board", methods=",".join(METHODS), every={"shots": "full"}, paper=ttc_protocol, omit=["shots"])
def main(
    run: Run,
    passes: Annotated[
        float | None, typer.Option(min=1, help="Image passes that each training may take.  [default: tecoa's recipe]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method, with seeds from --seed on.")] = 1,
    attacks: Annotated[
        list[str], typer.Option(metavar="ATTACKS", help=f"As rayclip eval has them.  [default: {ATTACKS}]")
    ] = [],  # noqa: B006
    captions: Annotated[
        str | None, typer.Option(help="saft's table of captions.  [default: digits' own, else templates]")
    ] = None,
) -> None:
    """Fine-tune with each method for the same compute, and attack the results."""
    from rayclip.api.equal_compute import report_equal_compute, share_compute
    from rayclip.reports.to_terminal import show

    captions = captions or (None if run.data == ("digits",) else "templates")
    whole = run.image_trials(captions=captions)
    budget = run.trial(BASELINE, run.method(BASELINE)).config
    shares = dict(zip(run.methods, share_compute([t.config for t in whole], budget, passes, run.where()), strict=True))
    trials: dict[str, list[Any]] = {}
    for one in whole:
        steps, epochs, *_ = shares[one.name]
        for seed in range(run.options.seed, run.options.seed + seeds):
            label = one.name if seeds == 1 else f"{one.name} seed {seed}"
            settings = {"total_steps": steps, "save_every_epochs": epochs, "seed": seed}
            trial = run.trial(label, one.config.method, recipe={"epochs": epochs}, **settings)
            trials.setdefault(one.name, []).append(trial)
    title = f"{run.name} {run.options.scale}"
    found = run.go(
        [trial for alike in trials.values() for trial in alike], run.evaluations(",".join(attacks) or ATTACKS)
    )
    if found.rows:
        show(report_equal_compute(title, trials, shares, BASELINE, run.where()))


if __name__ == "__main__":
    start(main)

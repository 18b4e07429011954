"""How do TTC's settings affect accuracy?  Its ablations: the threshold tau, the weight beta, the steps.

    python sweeps/ttc_settings.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/ttc_settings.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/ttc_settings.py --scale paper

Cost: `digits` 2 minutes of processor time beside the start of Ray, on 100 of its test images. `paper` has not been run
by us: one model behind ten settings, attacked on 16 data sets twice, blind to the defence and through it (4 draws a
step).

To expect at the scale `paper`: our source (TTC's abstract) prints no numbers. tau = 0.2, beta = 2 and 2 steps are its
choice.
"""

from typing import Annotated

import typer

from rayclip.cli.scales import ttc_protocol
from rayclip.cli.sweep import Run, split, start, sweep
from rayclip.units import format_budget, parse_budget

Values = Annotated[list[str], typer.Option(metavar="N,N…", help="Commas between.")]
TAU, BETA, STEPS = ["0,0.1,0.2,0.4"], ["0,1,2,4"], ["1,2,4"]
USUAL = {"tau": "0.2", "beta": "2", "steps": "2"}


@sweep("ttc-settings", omit=["methods", "shots", "epochs"], paper=ttc_protocol, small={"limit": 100})
def main(
    run: Run,
    tau: Values = TAU,
    beta: Values = BETA,
    steps: Values = STEPS,
    defense_eps: Annotated[
        str | None, typer.Option(help="TTC's budget.  [default: 4/255 at paper, else the attack's]")
    ] = None,
) -> None:
    """Defend the untouched model with TTC, changing one setting at a time, and attack it."""
    eps = parse_budget(defense_eps, "defense-eps") if defense_eps else 4 / 255 if run.is_paper else run.setting.eps
    budget = f"eps={format_budget(eps)},step={format_budget(eps / 4)}"
    settings = [
        USUAL | {name: value}
        for name, values in (("tau", tau), ("beta", beta), ("steps", steps))
        for value in split(values)
    ]
    chains = [f"ttc:{budget}," + ",".join(f"{k}={v}" for k, v in chosen.items()) for chosen in settings]
    run.go([], run.evaluations("clean,pgd", defenses=",".join(["none", *dict.fromkeys(chains)])))


if __name__ == "__main__":
    start(main)

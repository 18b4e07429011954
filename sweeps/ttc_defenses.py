"""How much does a defence at test time help?  TTC's tables: defences × data sets on plain and fine-tuned models.

    python sweeps/ttc_defenses.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/ttc_defenses.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/ttc_defenses.py --scale paper

Cost: `digits` 5 minutes of processor time, 3 on two cores, on 50 of its test images. `paper` has not been run
by us: four trainings on TinyImageNet, and five models behind six defences attacked on 16 data sets twice, blind to the
defence and through it (4 draws a step).

To expect at the scale `paper`: our source (TTC's abstract) prints no numbers. It claims stable gains on 16 data sets
over defences without other networks, hardly any loss of clean accuracy, and gains on adversarially fine-tuned models as
well; all under attacks that ignore the defence. The column `bpda` is ours.
"""

from typing import Annotated

import typer

from rayclip.cli.scales import ttc_protocol
from rayclip.cli.sweep import Run, start, sweep
from rayclip.units import format_budget, parse_budget

FINE_TUNED = "ft-standard,tecoa,pmg-aft,fare"


@sweep("ttc-defenses", methods=FINE_TUNED, every={"shots": "full"}, paper=ttc_protocol, small={"limit": 50})
def main(
    run: Run,
    defense_eps: Annotated[
        str | None, typer.Option(help="Budget of the defences.  [default: 4/255 at paper, else the attack's]")
    ] = None,
) -> None:
    """Defend the untouched and every fine-tuned model with each defence; attack ignoring it and through it."""
    eps = parse_budget(defense_eps, "defense-eps") if defense_eps else 4 / 255 if run.is_paper else run.setting.eps
    run.go(run.image_trials(), run.evaluations("clean,pgd", defenses=defenses(eps, run.model)))


def defenses(eps: float, original: str) -> str:
    """Return TTC's comparison: all defences with the same budget; tau is measured on the original encoder."""
    whole, step = format_budget(eps), format_budget(eps / 4)
    return (
        f"none,rn:eps={whole},tte,anti-adversary:eps={whole},hedge:eps={whole},"
        f"ttc:eps={whole},step={step},original={original}"
    )


if __name__ == "__main__":
    start(main)

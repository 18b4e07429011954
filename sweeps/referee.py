"""What of a test-time defence's gain is left when the attack goes through it?  Models × defences × blind and adaptive.

    python sweeps/referee.py                          # bundled digits: minutes on two cores, no downloads
    python sweeps/referee.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/referee.py --scale paper --add zoo:fare2,zoo:tecoa2

One table and one figure, `referee.md`, `.csv` and `.svg` in the results: the gain under attacks that ignore the defence
against what is left under all, with the cost per image. `rayclip report` on the results has both, too.

Cost: `digits` about 10 minutes of processor time a seed, trainings included, on 120 of its test images.
`paper` has not been run by us: twelve classifiers of each model under APGD-CE and APGD-T with 100 iterations, as
RobustVLM has them, on 1,000 images of 13 data sets and ImageNet.

Settings: at `paper` the published ones. At the small scales `SETTINGS`, chosen on a fifth of the training images by the
sum of clean accuracy and that under PGD-10 that ignores the defence, gates left at work, among a few multiples of the
published ones, where these do little; a defence that is not there, or is given with settings, stays as it is written.

To expect at the scale `paper`: independent runs left TTC and ET3 0.6 % or less under AutoAttack through them, at 4/255.
"""

from typing import Annotated

import typer

from rayclip.cli.scales import robustvlm_protocol
from rayclip.cli.sweep import Run, split, start, sweep

DEFENSES = "none,ttc,nac,doc,csr,et3,clipure-cos,rtpt,rn,tte,anti-adversary,hedge"
SETTINGS: dict[str, dict[str, str]] = {
    "digits": {
        "ttc": "ttc:eps=32/255,step=8/255,tau=0.4",
        "nac": "nac:eps=32/255,step=8/255,tau=0.4",
        "doc": "doc:eps=32/255,step=8/255,tau=0.02",
        "csr": "csr:eps=32/255,step=16/255,threshold=0.95,radius=0.3",
        "et3": "et3:eps=40/255,step=20/255",
        "clipure-cos": "clipure-cos:length=0.05",
        "rtpt": "rtpt:count=8",
        "rn": "rn:eps=64/255",
        "hedge": "hedge:steps=5,step=8/255",
    },
    "pocket": {
        "doc": "doc:eps=2/255,step=1/255",
        "csr": "csr:eps=2/255,step=1/255",
        "clipure-cos": "clipure-cos:length=0.02",
        "rtpt": "rtpt:count=8",
        "hedge": "hedge:steps=5",
    },
    "paper": {},
}
ATTACKS = {
    "digits": "clean,apgd-ce:iterations=10,apgd-t:iterations=5,targets=2",
    "pocket": "clean,pgd,apgd-ce:iterations=10",
    "paper": "clean,apgd-ce+apgd-t:iterations=100",
}


@sweep("referee", methods="tecoa,fare", every={"shots": "full"}, paper=robustvlm_protocol, small={"limit": 120})
def main(
    run: Run,
    defenses: Annotated[str, typer.Option(help="In the syntax of rayclip eval --defense.")] = DEFENSES,
    attacks: Annotated[str, typer.Option(help="As rayclip eval has them.  [default: the scale's]")] = "",
    aim: Annotated[str, typer.Option(help="As rayclip eval has it: ignore is blind, the rest is adaptive.")] = (
        "ignore,gate,rn"
    ),
    draws: Annotated[int, typer.Option(min=1, help="EOT draws of a random defence.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of attacks and random defences, from --seed on.")] = 1,
    adaptive_limit: Annotated[
        int | None, typer.Option(min=1, help="Attack through defences on fewer images.  [default: on all]")
    ] = None,
    add: Annotated[
        list[str], typer.Option(metavar="MODEL", help="Further models as --model names them, commas between.")
    ] = [],  # noqa: B006
) -> None:
    """Attack the untouched, the fine-tuned and other models behind every defence, ignoring it and through it."""
    chains, scale = settled(defenses, run.options.scale), run.options.scale
    attacks, scorers = attacks or ATTACKS[scale], "ensemble:templates=clip" if run.is_paper else "template"
    aims = split([settled(aim, scale)])
    trials, others = run.image_trials(), {spec: spec for spec in split(add)}
    parts, labels = {}, {}
    for seed in range(run.options.seed, run.options.seed + (1 if run.options.plan else seeds)):
        halves = {"": (aims, None)}
        if adaptive_limit:
            halves = {"": (["ignore"], None), "-adaptive": ([a for a in aims if a != "ignore"], adaptive_limit)}
        for half, (chosen, limit) in halves.items():
            part = f"seed-{seed}{half}"
            parts[part] = run.evaluations(
                attacks,
                defenses=chains,
                scorers=scorers,
                aim=",".join(chosen),
                draws=draws,
                limit=limit,
                seed=seed,
            )
            found = run.go(trials, parts[part], others=others, part=part, show=False)
            labels |= found.labels
    if labels:
        run.referee(labels, parts)


def settled(defenses: str, scale: str) -> str:
    """Return the defences with the scale's settings where none are given."""
    own = SETTINGS[scale]
    return ",".join("+".join(own.get(link, link) for link in part.split("+")) for part in defenses.split(","))


if __name__ == "__main__":
    start(main)

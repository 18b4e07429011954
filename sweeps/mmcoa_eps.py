"""How much robustness is left at larger budgets than in training?  MMCoA's figure 6.

    python sweeps/mmcoa_eps.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_eps.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_eps.py --scale paper

Cost: `digits` 2 minutes of processor time. `paper` has not been run by us: MMCoA's full-shot row of
`mmcoa_shots.py` (which `--models` shares), attacked at three budgets.

To expect at the scale `paper`: the figure prints no numbers. The paper reads from it that MMCoA's robust accuracy
declines stepwise from 1/255 to 2/255 and 4/255; at 1/255 table II has 22.00 % under the multimodal attack.
"""

import dataclasses
from typing import Annotated

import typer

from rayclip.cli.sweep import Run, start, sweep
from rayclip.types import Row
from rayclip.units import format_budget, parse_budgets


@sweep("mmcoa-eps", methods="mmcoa", every={"shots": "full"})
def main(
    run: Run,
    test_eps: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N/255,…",
            help="Budgets of the attacks, commas between.  [default: 1, 2 and 4 times the training's]",
        ),
    ] = None,
) -> None:
    """Fine-tune at one budget, and attack at several."""
    usual = tuple(run.setting.eps * factor for factor in (1, 2, 4))
    budgets = parse_budgets(test_eps, "test-eps") if test_eps else usual
    found = run.go(run.trials(), run.evaluations("clean,pgd,sep", eps=budgets), show=False)
    rows = [by_budget(row, found.labels[row.model]) for row in found.rows]
    run.show(dataclasses.replace(found, rows=sorted(rows, key=lambda row: row.eps or 0), labels={}))


def by_budget(row: Row, label: str) -> Row:
    """Return the row with the budget in the model's name; the step is left out, since it depends on the budget."""
    model = f"{label} {format_budget(row.eps)}" if row.eps else label
    protocol = {k: v for k, v in row.protocol.items() if k != "step"}
    return dataclasses.replace(row, model=model, attack=row.attack.partition("_eps")[0], protocol=protocol)


if __name__ == "__main__":
    start(main)

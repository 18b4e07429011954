"""Do adversarial images made against the template also fool CuPL and WCA?  SAFT's question.

    python sweeps/saft_scorers.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/saft_scorers.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --captions T.csv
    ray job submit --working-dir . -- python sweeps/saft_scorers.py --scale paper --captions FOLDER

Cost: `digits` 5 minutes of processor time. `paper` has not been run by us: two trainings on
TinyImageNet, and three models attacked on 16 data sets under three scorers; WCA takes 60 crops of an image. FOLDER
holds a table of `rayclip captions filter` for TinyImageNet and for each of the 16: `tiny_imagenet.parquet`, ….

To expect at the scale `paper`: our source (SAFT's summary, arXiv 2602.12461) prints no numbers. It claims that examples
made against the template may fail to fool CLIP when captions score, and that training on them therefore protects less.
"""

from typing import Annotated

import typer

from rayclip.cli.scales import zero_shot
from rayclip.cli.sweep import Run, start, sweep


@sweep("saft-scorers", methods="tecoa,saft", every={"shots": "full"}, paper=zero_shot)
def main(
    run: Run,
    captions: Annotated[
        str | None, typer.Option(help="Table of captions, or a folder of them.  [default: digits' own]")
    ] = None,
    crops: Annotated[int | None, typer.Option(min=1, help="Of WCA.  [default: 60, or 8 at digits]")] = None,
) -> None:
    """Attack the template and each scorer itself, and score the results with template, CuPL and WCA."""
    table = f":captions={captions}" if captions else ""
    count = crops or (60 if run.is_paper else 8)
    scorers = f"template,cupl{table},wca:crops={count}{',' + table[1:] if table else ''}"
    evaluations = run.evaluations("clean,pgd", scorers=scorers, made_against=("template", "own"))
    run.go(run.image_trials(captions=captions), evaluations)


if __name__ == "__main__":
    start(main)

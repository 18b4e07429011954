"""Which source of captions is best?  SAFT's ablation: a language model, or one that sees images.

    python sweeps/saft_sources.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/saft_sources.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --sources L.csv,M.csv
    ray job submit --working-dir . -- python sweeps/saft_sources.py --scale paper --sources L.parquet,M.parquet

Cost: `digits` 3 minutes of processor time. `paper` has not been run by us: as many trainings of SAFT
on TinyImageNet as there are sources, and as many models attacked on 16 data sets.

To expect at the scale `paper`: our source (SAFT's summary, arXiv 2602.12461) prints no numbers. The paper has SAFT-L
(captions of a language model) and SAFT-M (of a multimodal one); each is a table of `rayclip captions filter`. At
`digits` the bundled captions stand against plain templates.
"""

from pathlib import Path
from typing import Annotated

import typer

from rayclip.cli.scales import zero_shot
from rayclip.cli.sweep import Run, start, sweep
from rayclip.paths import split_places
from rayclip.types import UserError


@sweep("saft-sources", omit=["methods"], every={"shots": "full"}, paper=zero_shot)
def main(
    run: Run,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLES",
            help="Tables of captions, or templates, commas between.  [default: digits' own and templates]",
        ),
    ] = None,
    sets: Annotated[int, typer.Option(min=1, help="Captions of each class.")] = 5,
) -> None:
    """Fine-tune with SAFT on the captions of each source, and attack the results."""
    tables = tuple(split_places(sources or ())) or (("digits", "templates") if run.data == ("digits",) else ())
    if not tables:
        raise UserError("--sources is missing: give tables that rayclip captions filter has written, or templates.")
    trials = [run.trial(f"saft {Path(table).stem}", run.method("saft", captions=table, sets=sets)) for table in tables]
    run.go(trials, run.evaluations("clean,pgd,cw"))


if __name__ == "__main__":
    start(main)

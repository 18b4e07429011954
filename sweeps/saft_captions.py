"""How many captions, and whose?  SAFT's ablations: the number of captions and their source.

    python sweeps/saft_captions.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/saft_captions.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --sources T.csv
    ray job submit --working-dir . -- python sweeps/saft_captions.py --scale paper --sources L.parquet,M.parquet

Cost: `digits` about 8 minutes on two CPU cores, by estimate. `paper` has not been run by us: as many trainings of SAFT
as there are numbers of captions times sources, and as many models attacked on 16 data sets.

To expect at the scale `paper`: our source (SAFT's summary, arXiv 2602.12461) prints no numbers. M = 5 is the paper's
choice; sources are a language model (SAFT-L) and one that sees images (SAFT-M), each a table of `rayclip captions
filter`.
"""

from pathlib import Path
from typing import Annotated

import typer

from rayclip.cli_sweep import Run, split, start, sweep, zero_shot
from rayclip.types import UserError


@sweep("saft-captions", omit=["methods"], every={"shots": "full"}, paper=zero_shot)
def main(
    run: Run,
    sets: Annotated[str, typer.Option(help="Captions of each class, commas between.")] = "1,3,5",
    sources: Annotated[
        str | None,
        typer.Option(help="Tables of captions, or templates, commas between.  [default: digits' own and templates]"),
    ] = None,
) -> None:
    """Fine-tune with SAFT on each number of captions from each source."""
    counts = split(sets)
    if not all(count.isascii() and count.isdigit() and int(count) for count in counts):
        raise UserError(f"--sets {sets} holds something else than numbers from 1 on: write 1,3,5.")
    tables = split(sources) or ("digits", "templates") if run.data == ("digits",) else split(sources)
    if not tables:
        raise UserError("--sources is missing: give tables that rayclip captions filter has written, or templates.")
    trials = [
        run.trial(f"saft {Path(table).stem} M={count}", run.method("saft", captions=table, sets=int(count)))
        for table in tables
        for count in counts
    ]
    run.go(trials, [run.evaluation("clean,pgd,cw")])


if __name__ == "__main__":
    start(main)

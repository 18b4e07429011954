"""The options of every sweep."""

from dataclasses import dataclass
from typing import Annotated

import typer

from rayclip.cli.options import Cluster, JsonLogs, MinWorkers, Quiet, Seed, Substitutes, Tracking, Verbose
from rayclip.cli.scales import ScaleName


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every sweep."""

    scale: Annotated[
        ScaleName,
        typer.Option(help="digits needs nothing; pocket takes --model and --data; paper is the papers' setting."),
    ] = ScaleName.digits
    model: Annotated[
        str | None, typer.Option(help="local-dir:PATH, hf-hub:ORG/NAME or NAME:TAG.  [default: the scale's]")
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="A name or FILE.parquet. Without --test a fifth of it is held out.  [default: the scale's]",
        ),
    ] = None
    test: Annotated[
        list[str] | None, typer.Option(metavar="DATA", help="Test data, commas between.  [default: the scale's]")
    ] = None
    methods: Annotated[list[str] | None, typer.Option(metavar="METHODS", help="Commas between.")] = None
    shots: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N…", help="Images per class, commas between.  [default: the scale's]", show_default=False
        ),
    ] = None
    eps: Annotated[str | None, typer.Option(help="Budget in training and test.  [default: the scale's]")] = None
    epochs: Annotated[int | None, typer.Option(min=1, help="For every trial.  [default: the scale's]")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Test at most this many images.")] = None
    substitutes: Substitutes = "default"
    seed: Seed = 0
    out: Annotated[str | None, typer.Option(help="Folder or URI.  [default: runs/THIS_SWEEP-SCALE]")] = None
    models: Annotated[
        str | None,
        typer.Option(
            help="Checkpoints that sweeps share: what one has trained another does not.  [default: OUT/models]"
        ),
    ] = None
    workers: Annotated[int, typer.Option(min=1, help="Train workers of each trial.")] = 1
    min_workers: MinWorkers = None
    cluster: Cluster = False
    tracking_uri: Tracking = None
    quiet: Quiet = False
    json_logs: JsonLogs = False
    verbose: Verbose = False

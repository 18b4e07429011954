"""The options of every sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from rayclip.cli.command import Positive
from rayclip.cli.scales import ScaleName


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every sweep.

    Attributes:
        scale: digits needs nothing; pocket takes --model and --data; paper is the papers' setting.
        model: local-dir:PATH, hf-hub:ORG/NAME or NAME:TAG. [default: the scale's]
        data: A name or FILE.parquet. Without --test a fifth of it is held out. [default: the scale's]
        test: Test data, commas between. [default: the scale's]
        methods: Commas between.
        shots: Images per class, commas between. [default: the scale's]
        eps: Budget in training and test. [default: the scale's]
        epochs: For every trial. [default: the scale's]
        limit: Test at most this many images.
        out: Folder or URI. [default: runs/THIS_SWEEP-SCALE]
        models: Checkpoints that sweeps share: what one has trained another does not. [default: OUT/models]
        workers: Train workers of each trial.
    """

    scale: ScaleName = ScaleName.digits
    model: str | None = None
    data: Annotated[Sequence[str], typer.Option(metavar="DATA")] = ()
    test: Annotated[Sequence[str], typer.Option(metavar="DATA")] = ()
    methods: Annotated[Sequence[str], typer.Option(metavar="METHODS")] = ()
    shots: Annotated[Sequence[str], typer.Option(metavar="N,N…")] = ()
    eps: str | None = None
    epochs: Positive | None = None
    limit: Positive | None = None
    substitutes: str = "default"
    seed: Annotated[int, typer.Option(min=0)] = 0
    out: str | None = None
    models: str | None = None
    workers: Positive = 1
    min_workers: Positive | None = None
    cluster: bool = False
    tracking_uri: str | None = None
    quiet: bool = False
    json_logs: bool = False
    verbose: bool = False

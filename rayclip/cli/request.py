"""The options that `rayclip eval`, `plan` and `interpolate` share, and the evaluation that they describe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.cli.command import FromZero, Positive
from rayclip.cli.options import (
    Logging,
    attack_defaults,
    check_data,
    check_models,
    check_places,
    split_models,
)
from rayclip.names import check_attacks, check_defenses, check_scorers
from rayclip.paths import split_places
from rayclip.types import UserError
from rayclip.units import parse_budgets

if TYPE_CHECKING:
    from rayclip.api import Evaluation, Where
    from rayclip.data import Names


@dataclass(frozen=True, kw_only=True)
class Request(Logging):
    """The options of an evaluation, validated when they are given.

    Attributes:
        data: Data set names or Parquet files (Hugging Face layout); repeat for several, or commas between.
        limit: Use at most this many images of each data set.
        attacks: Names with settings: clean,pgd:steps=100,step=1/255,pgd-l2:eps=128/255,bert.
        precision: Attack a copy of the model in this precision; what breaks the copy counts only if it breaks the fp32
            model. bf16 pays on GPUs with bf16 matrix units, not on most CPUs.
        compiled: Attack a compiled model: minutes of compilation first, which pays for long attacks on GPUs.
        defense: Wrap each model in these test-time defences: none,ttc:eps=4/255,rn+tte (+ makes a chain).
        aim: Attack a defended model without seeing the defence (ignore), by differentiating it (straight), or with the
            identity in its place on the backward pass (bpda), also through its own decision (gate).
        draws: Average this many draws of a random defence at each query of an attack through it (EOT). [default: 4]
        scorer: Score images by template, ensemble, cupl:captions=FILE, wca:captions=FILE,crops=60. For several data
            sets FILE is a folder of NAME.parquet.
        made_against: Make images against the scorer itself (own), against the template, or both.
        gpus_per_worker: GPUs per worker; may be a fraction, such as 0.25.
        batch_size: Images per forward; halved where memory is short, which changes no verdict.
        shard_size: Images per result file, at most.
    """

    model: Annotated[Sequence[str], typer.Option(metavar="MODEL")]
    data: Annotated[Sequence[str], typer.Option(metavar="DATA")]
    out: str
    attacks: Annotated[Sequence[str], typer.Option(metavar="ATTACKS")] = ("clean,pgd",)
    defense: Annotated[Sequence[str], typer.Option(metavar="DEFENSES")] = ("none",)
    aim: Annotated[Sequence[str], typer.Option(metavar="AIMS")] = ("ignore,bpda",)
    draws: Positive | None = None
    scorer: Annotated[Sequence[str], typer.Option(metavar="SCORERS")] = ("template",)
    made_against: Annotated[Sequence[str], typer.Option(metavar="SCORER")] = ("own",)
    eps: Annotated[Sequence[str], typer.Option(metavar="N/255,…")] = ()
    steps: Positive = 10
    step_size: str | None = None
    limit: Positive | None = None
    substitutes: str = "default"
    resolution: Literal["native", "model"] = "native"
    resize: Literal["antialias", "plain"] = "antialias"
    class_names: Annotated[str, typer.Option(metavar="curated|raw|FILE")] = "curated"
    seed: FromZero = 0
    gpus_per_worker: Annotated[float | None, typer.Option(min=0)] = None
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel="Cluster")] = 128
    shard_size: Positive = 256
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compiled: Annotated[bool, typer.Option("--compile")] = False
    cluster: bool = False
    json: Annotated[str | None, typer.Option(metavar="FILE")] = None
    quiet: bool = False
    json_logs: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        check_places(self.out, self.json)
        super().__post_init__()
        check_attacks(",".join(self.attacks), has_budget=bool(self.budgets))
        check_defenses(",".join(self.defense))
        check_scorers(",".join(self.scorer))
        check_models(self.models)
        check_data(split_places(self.data))

    @property
    def models(self) -> list[str]:
        return split_models(self.model)

    @property
    def budgets(self) -> tuple[float, ...]:
        return parse_budgets(self.eps)

    @cached_property
    def _named(self) -> "tuple[Names, list[str]]":
        """The spelling of the class names, and the data with the file of its class names, if one is given."""
        from rayclip.data.spec import choose_names

        return choose_names(self.class_names, split_places(self.data))

    @cached_property
    def words(self) -> dict[str, Any]:
        """Everything that decides the results and where they are logged (`answers`)."""
        from rayclip.data import locate
        from rayclip.tracking.address import default_uri

        names, data = self._named
        listed = (self.attacks, self.defense, self.aim, self.scorer, self.made_against)
        return {
            "models": self.models,
            "data": [locate(spec) for spec in data],
            "with": [",".join(values) for values in listed],
            "attack": [list(self.budgets), self.steps, self.step_size, self.substitutes, self.draws, self.seed],
            "protocol": [self.limit, self.resolution, self.resize, names, self.precision, self.compiled],
            "tracking": None if self.no_tracking else [self.tracking_uri or default_uri(), self.experiment],
        }

    @property
    def files(self) -> list[str]:
        """The parts of `words` that may name files."""
        from rayclip.data.spec import parse_spec

        read = [parse_spec(spec) for spec in self.words["data"]]
        values = [part for text in self.words["with"] for part in re.split("[,+=]", text)]
        places = [*(r.place for r in read), *(r.reading.names or "" for r in read)]
        return [*self.models, *places, self.substitutes, *values]

    @cached_property
    def evaluation(self) -> "Evaluation":
        from rayclip.api import Evaluation
        from rayclip.attacks import parse_attacks
        from rayclip.defenses import DRAWS, parse_aims, parse_defenses
        from rayclip.evaluation import Protocol
        from rayclip.models.scorers import parse_scorers

        names, data = self._named
        defaults = attack_defaults(self.steps, self.step_size, self.substitutes)
        return Evaluation(
            data=data,
            attacks=parse_attacks(",".join(self.attacks), defaults),
            protocol=Protocol(
                eps=self.budgets,
                seed=self.seed,
                resolution=self.resolution,
                resize=self.resize,
                names=names,
                precision=self.precision,
            ),
            limit=self.limit,
            defenses=parse_defenses(",".join(self.defense)),
            aims=parse_aims(",".join(self.aim), self.draws or DRAWS),
            scorers=parse_scorers(",".join(self.scorer)),
            made_against=_made_against(",".join(self.made_against)),
        )

    def where(self, workers: int | None = None) -> "Where":
        """Return where the evaluation runs, on so many workers."""
        from rayclip.api import Where
        from rayclip.distributed.resources import PoolSize

        return Where(
            out=self.out,
            tracking=self.tracking,
            cluster=self.cluster,
            pool=PoolSize(
                workers=workers,
                gpus=self.gpus_per_worker,
                batch_size=self.batch_size,
                shard_size=self.shard_size,
                compiled=self.compiled,
            ),
            quiet=self.quiet,
            verbose=self.verbose,
        )


def _made_against(text: str) -> list[Any]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in ("own", "template"):
            raise UserError(f"--made-against '{word}' is none: use own, template, or both with a comma between.")
    return words

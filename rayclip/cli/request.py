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
    check_data,
    check_models,
    check_places,
    split_models,
)
from rayclip.names import check_attacks, check_defenses, check_scorers, check_template, find_protocol
from rayclip.paths import split_places
from rayclip.units import parse_budgets

if TYPE_CHECKING:
    from rayclip.api import Evaluation, Where
    from rayclip.data import Names


def _follow(context: typer.Context, name: str | None) -> str | None:
    """Make a protocol's settings the defaults of the options that are not given."""
    if name is not None:
        context.default_map = find_protocol(name)
    return name


@dataclass(frozen=True, kw_only=True)
class Request(Logging):
    """The options of an evaluation, validated when they are given.

    Attributes:
        protocol: Take data, attacks, budgets, number of images, template and resolution from a protocol of the field,
            and what else is given from here: tecoa, robustvlm, coop. The table's foot says what differs from it.
        data: Data set names or Parquet files (Hugging Face layout); repeat for several, or commas between.
        template: Class prompts, with {} for the class.  [default: This is a photo of a {}]
        resolution: Perturb images at their own size (native), or resize them to the model's input first (model, as SAFT
            and TTC do; clip, as CLIP does), or take these data sets at their own size and the others at the model's
            (native:cifar10+stl10; native:cifar10+stl10,clip).
        limit: Use at most this many images of each data set.
        subset: The images that --limit keeps: evenly spaced, or drawn as RobustVLM's code does (of data prepared from
            a WebDataset the same ones).
        attacks: Names with settings: clean,pgd:steps=100,step=1/255,pgd-l2:eps=128/255,bert.
        precision: Attack a copy of the model in this precision; what breaks the copy counts only if it breaks the fp32
            model. bf16 pays on GPUs with bf16 matrix units, not on most CPUs.
        compiled: Attack a compiled model: minutes of compilation first, which pays for long attacks on GPUs.
        defense: Wrap each model in these test-time defences: none,ttc:eps=4/255,rn+tte (+ makes a chain).
        aim: Attack a defended model without seeing the defence (ignore), by differentiating it (straight), or with the
            identity in its place on the backward pass (bpda), also through its own decision (gate); or through another
            defence than its own, named as in --defense.
        draws: Average this many draws of a random defence at each query of an attack through it (EOT). [default: 4]
        judgements: Judge each attacked image with this many draws of a random defence; right only if all are right.
        scorer: Score images by template, ensemble, ensemble:templates=clip (each data set's own; or coop),
            cupl:captions=FILE, wca:captions=FILE,crops=60. For several data sets FILE is a folder of NAME.parquet.
        made_against: Make images against the scorer itself (own), against the template, or both.
        gpus_per_worker: GPUs per worker; may be a fraction, such as 0.25.
        save_adversarial: Also save adversarial images as a data set for each attack, OUT/adversarial/NAME, which --data
            and other tools read: PNG, judged again as they are rounded to 8 bits.
        batch_size: Images per forward; halved where memory is short, which changes no verdict. [default: as many as
            fit on a GPU, 128 on a CPU]
        shard_size: Images per result file, at most. [default: a batch, at least 256]
        data_workers: Threads per worker that decode images. [default: on a GPU its share of the cores less one, else 1]
    """

    model: Annotated[Sequence[str], typer.Option(metavar="MODEL")]
    data: Annotated[Sequence[str], typer.Option(metavar="DATA")]
    out: str
    protocol: Annotated[str | None, typer.Option(metavar="NAME", is_eager=True, callback=_follow)] = None
    attacks: Annotated[Sequence[str], typer.Option(metavar="ATTACKS")] = ("clean,pgd",)
    defense: Annotated[Sequence[str], typer.Option(metavar="DEFENSES")] = ("none",)
    aim: Annotated[Sequence[str], typer.Option(metavar="AIMS")] = ("ignore,bpda",)
    draws: Positive | None = None
    judgements: Positive = 1
    scorer: Annotated[Sequence[str], typer.Option(metavar="SCORERS")] = ("template",)
    made_against: Annotated[Sequence[str], typer.Option(metavar="SCORER")] = ("own",)
    eps: Annotated[Sequence[str], typer.Option(metavar="N/255,…")] = ()
    steps: Positive = 10
    step_size: str | None = None
    limit: Positive | None = None
    substitutes: str = "default"
    subset: Literal["even", "robustvlm"] = "even"
    resolution: Annotated[str, typer.Option(metavar="native|model|clip|native:NAMES[,clip]")] = "native"
    resize: Literal["antialias", "plain"] = "antialias"
    class_names: Annotated[str, typer.Option(metavar="curated|raw|FILE")] = "curated"
    template: str | None = None
    seed: FromZero = 0
    gpus_per_worker: Annotated[float | None, typer.Option(min=0)] = None
    batch_size: Annotated[int | None, typer.Option(min=1, rich_help_panel="Cluster")] = None
    shard_size: Positive | None = None
    data_workers: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compiled: Annotated[bool, typer.Option("--compile")] = False
    cluster: bool = False
    json: Annotated[str | None, typer.Option(metavar="FILE")] = None
    save_adversarial: bool = False
    quiet: bool = False
    json_logs: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        from rayclip.data.spec import split_resolution

        check_places(self.out, self.json)
        super().__post_init__()
        check_attacks(",".join(self.attacks), has_budget=bool(self.budgets))
        check_defenses(",".join(self.defense))
        check_scorers(",".join(self.scorer))
        check_models(self.models)
        check_data(split_places(self.data))
        split_resolution(self.resolution)
        if self.template is not None:
            check_template(self.template)

    @property
    def models(self) -> list[str]:
        return split_models(self.model)

    @property
    def budgets(self) -> tuple[float, ...]:
        return parse_budgets(self.eps)

    @property
    def differences(self) -> list[str]:
        """The options whose values are not the protocol's, and the protocol's: `limit 100 (1000)`."""
        found = []
        for option, value in find_protocol(self.protocol).items() if self.protocol else ():
            own = getattr(self, option)
            if _plain(own) != _plain(value):
                found.append(f"{option.replace('_', '-')} {_plain(own)} ({_plain(value)})")
        return found

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
            **({} if self.judgements == 1 else {"judgements": self.judgements}),
            **({} if self.subset == "even" else {"subset": self.subset}),
            "protocol": [self.limit, self.resolution, self.resize, names, self.precision, self.compiled, self.template],
            "followed": self.protocol,
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
        from rayclip.api.choosing import choose_evaluation

        names, data = self._named
        return choose_evaluation(
            data,
            attacks=",".join(self.attacks),
            defense=",".join(self.defense),
            aim=",".join(self.aim),
            draws=self.draws,
            judgements=self.judgements,
            scorer=",".join(self.scorer),
            made_against=",".join(self.made_against),
            eps=self.budgets,
            steps=self.steps,
            step_size=self.step_size,
            limit=self.limit,
            subset=self.subset,
            substitutes=self.substitutes,
            resolution=self.resolution,
            resize=self.resize,
            names=names,
            template=self.template,
            seed=self.seed,
            precision=self.precision,
            all_named=self.protocol is None,
        )

    def where(self, workers: int | None = None, *, local: bool = False) -> "Where":
        """Return where the evaluation runs, on so many workers, or `local`ly in this process."""
        from rayclip.api import Where
        from rayclip.distributed.resources import PoolSize

        return Where(
            out=self.out,
            tracking=self.tracking,
            cluster=None if local else self.cluster,
            save_adversarial=self.save_adversarial,
            pool=PoolSize(
                workers=workers,
                gpus=self.gpus_per_worker,
                batch_size=self.batch_size,
                shard_size=self.shard_size,
                compiled=self.compiled,
                data_workers=self.data_workers,
            ),
            quiet=self.quiet,
            verbose=self.verbose,
        )


def _plain(value: Any) -> str:
    return ",".join(value) if isinstance(value, list | tuple) else str(value)

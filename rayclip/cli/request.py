"""The options that `rayclip eval` and `rayclip plan` share, and the evaluation that they describe."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.cli.options import (
    ATTACKS,
    Attacks,
    AttackSteps,
    Budgets,
    ClassNames,
    Cluster,
    Data,
    Experiment,
    Json,
    JsonLogs,
    Limit,
    Models,
    NoTracking,
    Out,
    Quiet,
    Resize,
    Resolution,
    Seed,
    StepSize,
    Substitutes,
    Tracking,
    Verbose,
    attack_defaults,
    check_data,
    check_models,
    check_places,
    check_tracking,
    complete_defenses,
    one_list,
    split_models,
)
from rayclip.names import check_attacks, check_defenses, check_scorers
from rayclip.paths import split_places
from rayclip.types import UserError
from rayclip.units import parse_budgets

if TYPE_CHECKING:
    from rayclip.api.request import Evaluation, Where


# Lists, since these options are repeatable
_NO_DEFENSE, _AIMS, _SCORER, _OWN = ["none"], ["ignore,bpda"], ["template"], ["own"]


@dataclass(frozen=True)
class Request:
    """The options of an evaluation; `opened` turns them into an `Evaluation` after the heavy imports.

    Attributes:
        out, json: folder of the results; file to write the rows to.
        words, files: everything that determines the result; the parts of it that may name files (`answers`).
        stands_for: computes `opened`.
    """

    models: list[str]
    out: str
    json: str | None
    words: dict[str, Any]
    files: list[str]
    stands_for: Callable[[], tuple["Evaluation", "Where"]]

    @cached_property
    def opened(self) -> tuple["Evaluation", "Where"]:
        """The settings of the evaluation, and where it runs."""
        return self.stands_for()

    @property
    def evaluation(self) -> "Evaluation":
        return self.opened[0]

    @property
    def where(self) -> "Where":
        return self.opened[1]


def request(
    model: Models,
    data: Data,
    out: Out,
    attacks: Attacks = ATTACKS,
    defense: Annotated[
        list[str],
        typer.Option(
            metavar="DEFENSES",
            help="Wrap each model in these test-time defences: none,ttc:eps=4/255,rn+tte (+ makes a chain).",
            autocompletion=complete_defenses,
        ),
    ] = _NO_DEFENSE,
    aim: Annotated[
        list[str],
        typer.Option(
            metavar="AIMS",
            help="Attack a defended model without seeing the defence (ignore), by differentiating it "
            "(straight), or with "
            "the identity in its place on the backward pass (bpda).",
        ),
    ] = _AIMS,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Average this many draws of a random defence at each query of an attack through it (EOT).  "
            "[default: 4]",
            show_default=False,
        ),
    ] = None,
    scorer: Annotated[
        list[str],
        typer.Option(
            metavar="SCORERS",
            help="Score images by template, ensemble, cupl:captions=FILE, wca:captions=FILE,crops=60. For several data "
            "sets FILE is a folder of NAME.parquet.",
        ),
    ] = _SCORER,
    made_against: Annotated[
        list[str],
        typer.Option(
            metavar="SCORER",
            help="Make images against the scorer itself (own), against the template, or both.",
        ),
    ] = _OWN,
    eps: Budgets = None,
    steps: AttackSteps = 10,
    step_size: StepSize = None,
    limit: Limit = None,
    substitutes: Substitutes = "default",
    resolution: Resolution = "native",
    resize: Resize = "antialias",
    class_names: ClassNames = "curated",
    seed: Seed = 0,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs per worker; may be a fraction, such as 0.25.")
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Images per forward; halved where memory is short, which changes no verdict.",
            rich_help_panel="Cluster",
        ),
    ] = 128,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per result file, at most.")] = 256,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(
            help="Attack a copy of the model in this precision; what breaks the copy counts only if it breaks the fp32 "
            "model. bf16 pays on GPUs with bf16 matrix units, not on most CPUs."
        ),
    ] = "fp32",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Attack a compiled model: minutes of compilation first, which pays for long attacks on GPUs.",
        ),
    ] = False,
    cluster: Cluster = False,
    json: Json = None,
    tracking_uri: Tracking = None,
    no_tracking: NoTracking = False,
    experiment: Experiment = "rayclip-eval",
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    verbose: Verbose = False,
) -> Request:
    """Validate the options and return them as a `Request`."""
    check_places(out, json)
    check_tracking(tracking_uri, no_tracking)
    models, budgets = split_models(model), parse_budgets(eps or [])
    check_attacks(one_list(attacks), has_budget=bool(budgets))
    check_defenses(one_list(defense))
    check_scorers(one_list(scorer))
    check_models(models)
    check_data(split_places(data))

    from rayclip.data import locate
    from rayclip.data.spec import choose_names, parse_spec
    from rayclip.tracking.address import default_uri

    names, specs = choose_names(class_names, split_places(data))
    words: dict[str, Any] = {
        "models": models,
        "data": [locate(spec) for spec in specs],
        "with": [one_list(values) for values in (attacks, defense, aim, scorer, made_against)],
        "attack": [list(budgets), steps, step_size, substitutes, draws, seed],
        "protocol": [limit, resolution, resize, names, precision, compiled],
        "tracking": None if no_tracking else [tracking_uri or default_uri(), experiment],
    }
    read = [parse_spec(spec) for spec in words["data"]]
    values = [part for text in words["with"] for part in re.split("[,+=]", text)]
    files = [*models, *(r.place for r in read), *(r.reading.names or "" for r in read), substitutes, *values]

    def stands_for() -> tuple["Evaluation", "Where"]:
        from rayclip import api
        from rayclip.attacks import parse_attacks
        from rayclip.defenses import DRAWS, parse_aims, parse_defenses
        from rayclip.distributed.resources import PoolSize
        from rayclip.evaluation import Protocol
        from rayclip.models.scorers import parse_scorers

        evaluation = api.Evaluation(
            data=specs,
            attacks=parse_attacks(one_list(attacks), attack_defaults(steps, step_size, substitutes)),
            protocol=Protocol(
                eps=budgets,
                seed=seed,
                resolution=resolution,
                resize=resize,
                names=names,
                precision=precision,
            ),
            limit=limit,
            defenses=parse_defenses(one_list(defense)),
            aims=parse_aims(one_list(aim), draws or DRAWS),
            scorers=parse_scorers(one_list(scorer)),
            made_against=_made_against(one_list(made_against)),
        )
        where = api.Where(
            out=out,
            tracking=None if no_tracking else api.Tracking.choose(tracking_uri, experiment),
            cluster=cluster,
            pool=PoolSize(gpus=gpus_per_worker, batch_size=batch_size, shard_size=shard_size, compiled=compiled),
            quiet=quiet,
            verbose=verbose,
        )
        return evaluation, where

    return Request(models, out, json, words, files, stands_for)


def with_request(command: Callable[..., None], models: tuple[str, ...] = (), **defaults: Any) -> Callable[..., None]:
    """Return a command with the options of `request` and its own; it gets a `Request` as first argument.

    Args:
        models: the command's own options that name the models, in place of `--model`; it gets them as well.
        defaults: of options, where they differ from those of `request`.
    """
    shared = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in inspect.signature(request).parameters.values()
        if not (models and p.name == "model")
    ]
    _, *own = inspect.signature(command).parameters.values()

    def run(**options: Any) -> None:
        asked = {p.name: options.pop(p.name) for p in shared}
        if models:
            asked["model"] = [options[name] for name in models]
        command(request(**asked), **options)

    both = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared, *own)]
    run.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _made_against(text: str) -> list[Any]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in ("own", "template"):
            raise UserError(f"--made-against '{word}' is none: use own, template, or both with a comma between.")
    return words

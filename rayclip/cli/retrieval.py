"""`rayclip retrieval`: evaluate image-to-text and text-to-image retrieval."""

from typing import Annotated, Literal

import typer

from rayclip.cli.options import (
    AttackSteps,
    Budgets,
    Experiment,
    Json,
    JsonLogs,
    Models,
    NoTracking,
    Out,
    Quiet,
    Resize,
    Seed,
    Substitutes,
    Tracking,
    attack_defaults,
    check_data,
    check_models,
    check_places,
    check_tracking,
    complete_attacks,
    complete_data,
    hand_out,
    one_list,
    split_models,
)
from rayclip.names import check_attacks
from rayclip.units import parse_budgets

_CLEAN = ["clean"]


def retrieval(
    model: Models,
    data: Annotated[
        str,
        typer.Option(
            help="Parquet with image and captions: a file, a folder with test*.parquet, or a prepared data set's name.",
            autocompletion=complete_data,
        ),
    ],
    out: Out,
    attacks: Annotated[
        list[str],
        typer.Option(
            metavar="ATTACKS",
            help="Names with settings: clean,bert,pgd,sep,co-attack,sga:steps=10,step=0.5/255.",
            autocompletion=complete_attacks,
        ),
    ] = _CLEAN,
    eps: Budgets = None,
    steps: AttackSteps = 10,
    step_size: Annotated[
        str | None, typer.Option("--step-size", help="Length of an attack step.  [default: 1.25·eps/steps]")
    ] = None,
    substitutes: Substitutes = "default",
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images, with all their captions.")
    ] = None,
    resolution: Annotated[
        Literal["native", "model"],
        typer.Option(help="model: resize and take the centre; native: the images' own size, which must then be one."),
    ] = "model",
    resize: Resize = "antialias",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    json: Json = None,
    tracking_uri: Tracking = None,
    no_tracking: NoTracking = False,
    experiment: Experiment = "rayclip-retrieval",
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
) -> None:
    """Evaluate recall at 1, 5, 10 of images' captions (TR) and captions' images (IR), clean and attacked."""
    check_places(out, json)
    check_tracking(tracking_uri, no_tracking)
    models, budgets = split_models(model), parse_budgets(eps or [])
    check_attacks(one_list(attacks), has_budget=bool(budgets), on_pairs=True)
    check_models(models)
    check_data([data], pairs=True)

    from rayclip import api
    from rayclip.attacks import parse_attacks
    from rayclip.distributed.resources import PoolSize
    from rayclip.reports.rows import rows_json

    defaults = attack_defaults(steps, step_size, substitutes) | {"stop": "final"}
    where = api.Where(
        out=out,
        tracking=None if no_tracking else api.Tracking.choose(tracking_uri, experiment),
        pool=PoolSize(batch_size=batch_size),
        quiet=quiet,
    )
    rows = api.evaluate_retrieval(
        models,
        data,
        where,
        limit=limit,
        resolution=resolution,
        resize=resize,
        attacks=parse_attacks(one_list(attacks), defaults),
        eps=budgets,
        seed=seed,
    )

    def show() -> None:
        api.show_retrieval(rows)
        print(f"results: {out}")

    hand_out(json, rows_json(rows), show)

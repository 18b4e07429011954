"""`rayclip retrieval`: evaluate image-to-text and text-to-image retrieval."""

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from rayclip.cli.command import Positive
from rayclip.cli.options import (
    Logging,
    attack_defaults,
    check_data,
    check_models,
    check_places,
    hand_out,
    split_models,
)
from rayclip.names import check_attacks
from rayclip.units import parse_budgets


def retrieval(
    logging: Logging,
    model: Annotated[Sequence[str], typer.Option(metavar="MODEL")],
    data: str,
    out: str,
    attacks: Annotated[Sequence[str], typer.Option(metavar="ATTACKS")] = ("clean",),
    eps: Annotated[Sequence[str], typer.Option(metavar="N/255,…")] = (),
    steps: Positive = 10,
    step_size: str | None = None,
    substitutes: str = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    limit: Positive | None = None,
    resolution: Literal["native", "model"] = "model",
    resize: Literal["antialias", "plain"] = "antialias",
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel="Cluster")] = 128,
    json: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Evaluate recall at 1, 5, 10 of images' captions (TR) and captions' images (IR), clean and attacked.

    Args:
        data: Parquet with image and captions: a file, a folder with test*.parquet, or a prepared data set's name.
        attacks: Names with settings: clean,bert,pgd,sep,co-attack,sga:steps=10,step=0.5/255.
        step_size: Length of an attack step. [default: 1.25·eps/steps]
        limit: Use at most this many images, with all their captions.
        resolution: model: resize and take the centre; native: the images' own size, which must then be one.
        batch_size: Images per forward.
    """
    check_places(out, json)
    models, budgets = split_models(model), parse_budgets(eps)
    check_attacks(",".join(attacks), has_budget=bool(budgets), on_pairs=True)
    check_models(models)
    check_data([data], pairs=True)

    from rayclip import api
    from rayclip.attacks import parse_attacks
    from rayclip.distributed.resources import PoolSize
    from rayclip.reports.rows import rows_json

    defaults = attack_defaults(steps, step_size, substitutes) | {"stop": "final"}
    rows = api.evaluate_retrieval(
        models,
        data,
        api.Where(out=out, tracking=logging.tracking, pool=PoolSize(batch_size=batch_size), quiet=quiet),
        limit=limit,
        resolution=resolution,
        resize=resize,
        attacks=parse_attacks(",".join(attacks), defaults),
        eps=budgets,
        seed=seed,
    )

    def show() -> None:
        api.show_retrieval(rows)
        print(f"results: {out}")

    hand_out(json, rows_json(rows), show)

"""`rayclip train`: fine-tune one model, or learn a prompt for it."""

from typing import Annotated, Any, Literal

import typer

from rayclip.cli.options import (
    ClassNames,
    Cluster,
    Experiment,
    JsonLogs,
    MinWorkers,
    Model,
    NoTracking,
    Quiet,
    Resize,
    Resolution,
    StepSize,
    Substitutes,
    Tracking,
    Verbose,
    budget_of,
    check_data,
    check_models,
    check_tracking,
    complete_data,
    complete_methods,
    complete_models,
    least_of,
)
from rayclip.names import METHODS, check_method
from rayclip.paths import check_folder
from rayclip.types import UserError
from rayclip.units import format_budget, parse_budget


def train(
    method: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(METHODS)}, with its settings: mmcoa:lambda_img=0.3 (rayclip methods NAME shows "
            "them).",
            autocompletion=complete_methods,
        ),
    ],
    model: Annotated[str, typer.Option(help=Model, autocompletion=complete_models)],
    data: Annotated[
        str,
        typer.Option(help="Data set name, or a Parquet file in the Hugging Face layout.", autocompletion=complete_data),
    ],
    out: Annotated[str, typer.Option(help="Folder or URI of the checkpoint; an interrupted run there is resumed.")],
    shots: Annotated[str, typer.Option(help="Images per class, or full.")] = "full",
    attack: Annotated[
        str | None,
        typer.Option(
            help="Objective that the training attack maximises: own (the method's), pgd (cross-entropy), cw (logit "
            "margin) or feature (distance from the clean embedding).  [default: own; mmcoa with its published settings "
            "pgd]",
            show_default=False,
        ),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            help="Budget in pixel units, as a fraction.  [default: 1/255; fare 4/255, advpt by its published settings "
            "8/255]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the training attack.  [default: the method's]")
    ] = None,
    step_size: StepSize = None,
    norm: Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the training attack's budget.")] = "linf",
    start: Annotated[
        Literal["random", "zero"],
        typer.Option(help="Start the training attack at a random point of the ball, or at the image."),
    ] = "random",
    eps_warmup: Annotated[
        float, typer.Option(metavar="EPOCHS", help="Raise the training attack's budget from 0 over this many epochs.")
    ] = 0.0,
    epochs: Annotated[int | None, typer.Option(min=1, help="[default: the recipe's]")] = None,
    recipe: Annotated[
        Literal["paper", "small"] | None,
        typer.Option(
            help="Use the published code's settings, its whole warm-up included (paper), or settings for "
            "models of a few "
            "million parameters (small).  [default: small below 20 million parameters, else paper with a warm-up of at "
            "most a tenth of the run]"
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [default: the recipe's]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step, over all workers.  [default: the recipe's]")
    ] = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Split each worker's share of a batch into this many parts, to save memory.")
    ] = 1,
    optimizer: Annotated[Literal["sgd", "adam", "adamw"] | None, typer.Option(help="[default: the recipe's]")] = None,
    momentum: Annotated[
        float | None, typer.Option(min=0, max=1, help="Momentum of sgd.  [default: the recipe's]")
    ] = None,
    betas: Annotated[
        str | None, typer.Option(help="Decay rates of adam and adamw: 0.9,0.999.  [default: the recipe's]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="[default: the recipe's]")] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant"] | None,
        typer.Option(help="Schedule of the learning rate after its warm-up.  [default: the recipe's]"),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps of the warm-up, at most a tenth of the run unless --recipe paper.  [default: the recipe's]",
        ),
    ] = None,
    ema: Annotated[
        float,
        typer.Option(
            metavar="DECAY",
            help="Keep the moving average of the weights with this decay, such as 0.999; 0 keeps the last weights.",
        ),
    ] = 0.0,
    trains: Annotated[
        str | None,
        typer.Option(
            help="Train all parameters, the image encoder (image), or its last N blocks and what follows (last-N).  "
            "[default: the method's]"
        ),
    ] = None,
    substitutes: Substitutes = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resolution: Resolution = "native",
    resize: Resize = "antialias",
    class_names: ClassNames = "curated",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(help="Precision of training; auto is bf16 autocast on GPUs and fp32 on CPUs."),
    ] = "auto",
    save_every_steps: Annotated[int, typer.Option(min=0, help="Also write a checkpoint every N steps.")] = 0,
    data_workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Train workers (one GPU each where there are GPUs).")] = 1,
    min_workers: MinWorkers = None,
    cluster: Cluster = False,
    tracking_uri: Tracking = None,
    no_tracking: NoTracking = False,
    experiment: Experiment = "rayclip-train",
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model, or learn a prompt for it.

    The result is a checkpoint that `rayclip eval --model local-dir:OUT` and open_clip load; a prompt is loaded onto its
    model with `--model prompted:OUT`. The same command goes on with a run that was interrupted.

    \b
    Examples:
      rayclip train --method tecoa --model digits --data digits --eps 32/255 --out tecoa
      rayclip train --method mmcoa:lambda_img=0.3,targets=class --model ViT-B-32:openai --data caltech101 --shots 16 \\
        --out mmcoa --workers 4 --cluster
      rayclip train --method saft:captions=CAPTIONS.csv,sets=3 --model ViT-B-32:openai --data imagenet --out saft
    """
    check_folder("--out", out, done="rayclip.json")
    check_tracking(tracking_uri, no_tracking)
    check_method(method)
    budget = budget_of(eps)
    check_models([model])
    check_data([data])
    if lr is not None and not 0 < lr < float("inf"):
        raise UserError(f"--lr {lr} must be a positive number.")

    from rayclip import api
    from rayclip.api import checks
    from rayclip.data.spec import choose_names
    from rayclip.distributed.trials import Trial
    from rayclip.methods import make_method
    from rayclip.store import Store
    from rayclip.training import TrainConfig

    class_source, (data,) = choose_names(class_names, [data])
    asked: dict[str, Any] = {
        "against": attack,
        "eps": budget,
        "steps": steps,
        "step": parse_budget(step_size, "step-size") if step_size else None,
        "norm": norm,
        "start": start,
        "trains": trains,
    }
    small = recipe == "small" or (recipe is None and checks.is_small(model))
    chosen = make_method(method, published=not small, defaults={"substitutes": substitutes}, **asked)
    overrides: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "betas": parse_betas(betas),
        "schedule": schedule,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
    }
    config = TrainConfig(
        model=model,
        data=data,
        method=chosen,
        eps_warmup=eps_warmup,
        ema=ema,
        shots=parse_shots(shots),
        seed=seed,
        resolution=resolution,
        resize=resize,
        names=class_source,
        recipe=checks.choose_recipe(
            chosen,
            model,
            small=small,
            whole_warmup=recipe == "paper",
            overrides={k: v for k, v in overrides.items() if v is not None},
        ),
        precision=precision,
        save_every_steps=save_every_steps,
        data_workers=data_workers,
        accumulate=accumulate,
    )
    place = Store(out)
    trial = Trial(name=place.name, config=config, out=place.root)
    did_something = api.fine_tune(
        trial,
        api.Where(
            out=out,
            tracking=None if no_tracking else api.Tracking.choose(tracking_uri, experiment),
            cluster=cluster,
            train_workers=workers,
            least_workers=least_of(min_workers, workers),
            quiet=quiet,
            verbose=verbose,
        ),
    )
    if not did_something:
        print(f"{out} already holds this checkpoint; nothing to do.")
        return
    test = "TEST.parquet" if data.endswith(".parquet") else data
    print(f"checkpoint: {out}")
    same = "" if resize == "antialias" else f" --resize {resize}"
    written, results = format_budget(chosen.eps), place.child("eval").root
    print(f"evaluate it: rayclip eval --model {trial.model} --data {test} --eps {written}{same} --out {results}")


def parse_shots(text: str) -> int | None:
    """Parse a number of shots; `full` is None."""
    if text == "full":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--shots '{text}' is neither a number of images per class nor full: write 1, 5 or full.")
    return int(text)


def parse_betas(text: str | None) -> tuple[float, float] | None:
    """Parse Adam's decay rates of the gradients and their squares, `0.9,0.98`."""
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
        if 0 <= first < 1 and 0 <= second < 1:
            return first, second
    except ValueError:
        pass
    raise UserError(f"--betas '{text}' are not two numbers from 0 to below 1: write 0.9,0.98.")

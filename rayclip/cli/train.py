"""`rayclip train`: fine-tune one model, or learn a prompt for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.api.grid import parse_shots
from rayclip.cli.command import MODELS, FromZero, Positive
from rayclip.cli.options import Logging, check_data, check_models, least_of, split
from rayclip.names import METHODS, check_method
from rayclip.paths import check_folder
from rayclip.types import UserError
from rayclip.units import format_budget, parse_budget

if TYPE_CHECKING:
    from rayclip.api import Where
    from rayclip.distributed.trials import Trial

_METHOD = f"One of {', '.join(METHODS)}, with its settings: mmcoa:lambda_img=0.3 (rayclip methods NAME shows them)."


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Changes to a recipe.

    Attributes:
        lr: Learning rate. [default: the recipe's]
        batch_size: Images per step, over all workers. [default: the recipe's]
        epochs, optimizer, weight_decay: [default: the recipe's]
        momentum: Momentum of sgd. [default: the recipe's]
        betas: Decay rates of adam and adamw: 0.9,0.999. [default: the recipe's]
        schedule: Schedule of the learning rate after its warm-up. [default: the recipe's]
        warmup_steps: Steps of the warm-up, at most a tenth of the run unless --recipe paper. [default: the recipe's]
    """

    epochs: Positive | None = None
    lr: float | None = None
    batch_size: Positive | None = None
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    momentum: Annotated[float | None, typer.Option(min=0, max=1)] = None
    betas: str | None = None
    weight_decay: Annotated[float | None, typer.Option(min=0)] = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup_steps: FromZero | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UserError(f"--lr {self.lr} must be a positive number.")

    def given(self) -> dict[str, Any]:
        """Return the fields of a recipe to change."""
        return {key: value for key, value in {**vars(self), "betas": self.decay_rates()}.items() if value is not None}

    def decay_rates(self) -> tuple[float, float] | None:
        """Return Adam's decay rates of the gradients and their squares."""
        if self.betas is None:
            return None
        try:
            first, second = (float(part) for part in self.betas.split(","))
            if 0 <= first < 1 and 0 <= second < 1:
                return first, second
        except ValueError:
            pass
        raise UserError(f"--betas '{self.betas}' are not two numbers from 0 to below 1: write 0.9,0.98.")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Fields of a run's configuration, as they are.

    Attributes:
        eps_warmup: Raise the training attack's budget from 0 over this many epochs.
        accumulate: Split each worker's share of a batch into this many parts, to save memory.
        ema: Keep the moving average of the weights with this decay, such as 0.999; 0 keeps the last weights.
        precision: Precision of training; auto is bf16 autocast on GPUs and fp32 on CPUs.
        compiled: Attack a compiled copy of the model, with CUDA graphs on a GPU: a minute of compilation first.
        save_every_steps: Also write a checkpoint every N steps.
        data_workers: Processes that decode images. [default: on a GPU its share of the cores less one, else 0]
    """

    eps_warmup: Annotated[float, typer.Option(metavar="EPOCHS")] = 0.0
    accumulate: Positive = 1
    ema: Annotated[float, typer.Option(metavar="DECAY")] = 0.0
    resolution: Literal["native", "model"] = "native"
    resize: Literal["antialias", "plain"] = "antialias"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compiled: Annotated[bool, typer.Option("--compile")] = False
    save_every_steps: FromZero = 0
    data_workers: FromZero | None = None


def train(
    logging: Logging,
    changes: RecipeOptions,
    settings: ConfigOptions,
    method: Annotated[str, typer.Option(help=_METHOD)],
    model: Annotated[str, typer.Option(help=MODELS)],
    data: str,
    out: str,
    shots: str = "full",
    attack: str | None = None,
    eps: str | None = None,
    steps: Positive | None = None,
    step_size: str | None = None,
    norm: Literal["linf", "l2"] = "linf",
    start: Literal["random", "zero"] = "random",
    validate: Annotated[str | None, typer.Option(metavar="every=N,…")] = None,
    recipe: Literal["paper", "small"] | None = None,
    seed: Annotated[Sequence[str], typer.Option(metavar="N,N…")] = ("0",),
    trains: str | None = None,
    substitutes: str = "default",
    class_names: Annotated[str, typer.Option(metavar="curated|raw|FILE")] = "curated",
    workers: Positive = 1,
    min_workers: Positive | None = None,
    cluster: bool = False,
    quiet: bool = False,
    json_logs: bool = False,
    verbose: bool = False,
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

    Args:
        data: Data set name, or a Parquet file in the Hugging Face layout.
        out: Folder or URI of the checkpoint; an interrupted run there is resumed.
        shots: Images per class, or full.
        attack: Objective that the training attack maximises: own (the method's), pgd (cross-entropy), cw (logit
            margin) or feature (distance from the clean embedding). [default: own; mmcoa with its published settings
            pgd]
        eps: Budget in pixel units, as a fraction. [default: 1/255; fare 4/255, advpt by its published settings 8/255]
        steps: Steps of the training attack. [default: the method's]
        norm: Norm of the training attack's budget.
        start: Start the training attack at a random point of the ball, or at the image.
        validate: Every N epochs, judge on a held-out part of the training data, and keep the best weights in OUT/best:
            every=1,size=0.1,attacks=pgd:steps=20,eps=1/255. The first attack decides; size is a number or a share of
            the images. [default: no part is held out]
        recipe: Use the published code's settings, its whole warm-up included (paper), or settings for models of a few
            million parameters (small). [default: small below 20 million parameters, else paper with a warm-up of at
            most a tenth of the run]
        trains: Train all parameters, an encoder (image, text), or the image encoder's last N blocks and what follows
            (last-N); or lora:rank=8,alpha=16,part=image, low-rank changes of a part's layers. [default: the method's]
        seed: Seed of all random numbers; of several, each trains a model, OUT/seed-N, and the table has mean ± standard
            deviation.
        workers: Train workers (one GPU each where there are GPUs).
    """
    seeds = parse_seeds(seed)
    check_folder("--out", out, done="rayclip.json")
    check_method(method)
    budget = None if eps is None else parse_budget(eps)
    check_models([model])
    check_data([data])

    from rayclip import api
    from rayclip.api.choosing import choose_trial
    from rayclip.store import Store

    trial = choose_trial(
        method=method,
        model=model,
        data=data,
        out=out,
        shots=parse_shots(shots),
        attack=attack,
        eps=budget,
        steps=steps,
        step_size=parse_budget(step_size, "step-size") if step_size else None,
        norm=norm,
        start=start,
        recipe=recipe,
        trains=trains,
        substitutes=substitutes,
        class_names=class_names,
        changes=changes.given(),
        settings={**vars(settings), "seed": seeds[0], "validate": validate},
    )
    where = api.Where(
        out=out,
        tracking=logging.tracking,
        cluster=cluster,
        train_workers=workers,
        least_workers=least_of(min_workers, workers),
        quiet=quiet,
        verbose=verbose,
    )
    if len(seeds) > 1:
        _train_seeds(trial, seeds, where)
        return
    if not api.fine_tune(trial, where):
        print(f"{out} already holds this checkpoint; nothing to do.")
        return
    test = "TEST.parquet" if data.endswith(".parquet") else data
    print(f"checkpoint: {out}")
    if validate is not None:
        _show_best(trial.out)
    same = "" if settings.resize == "antialias" else f" --resize {settings.resize}"
    written, results = format_budget(trial.config.method.eps), Store(out).child("eval").root
    print(f"evaluate it: rayclip eval --model {trial.model} --data {test} --eps {written}{same} --out {results}")


def _train_seeds(trial: "Trial", seeds: Sequence[int], where: "Where") -> None:
    """Train with several seeds and print their numbers; exit with code 1 if some failed."""
    from rayclip import api
    from rayclip.progress import say
    from rayclip.reports.to_terminal import show

    found = api.fine_tune_seeds(trial, seeds, where)
    show([found.grid])
    for name, error in found.errors.items():
        say("error", f"{name} failed: {error}")
    if found.errors:
        raise typer.Exit(1)
    print(f"checkpoints: {', '.join(each.out for each in found.trials)}")


def parse_seeds(values: Sequence[str]) -> list[int]:
    """Parse `--seed 0,1,2`."""
    parts = split(values)
    if not parts or not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seed '{','.join(values)}' is none, or names one twice: write 0, or 0,1,2 for several runs.")
    return [int(part) for part in parts]


def _show_best(out: str) -> None:
    """Print which epoch was the best on held-out images."""
    from rayclip.models.checkpoint import read_lineage
    from rayclip.training.validation import BEST

    found = (read_lineage(out) or {})["validation"]
    best = found["best"]
    scores = ", ".join(f"{name} {value:.1f} %" for name, value in best.items() if name not in ("epoch", "step"))
    print(f"best on {found['images']} held-out images: epoch {best['epoch']} ({scores}): {out}/{BEST}")

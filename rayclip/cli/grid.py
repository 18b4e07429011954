"""`rayclip sweep`: train a grid of models, or search in it, and test the results."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from rayclip.api.grid import MANY, OPTIONS, Grid, SweepSettings
from rayclip.cli.command import Positive, add_command, read_docstring
from rayclip.cli.options import Logging, check_data, check_models, least_of, print_grid, split_models
from rayclip.cli.train import ConfigOptions, RecipeOptions, train
from rayclip.paths import check_folder, split_places
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.api.needs import Needs
    from rayclip.api.planning import StudyPlan

_LEAST = 0.001  # GPU hours that a plan still tells apart from nothing


def sweep(
    logging: Logging,
    settings: SweepSettings,
    method: Annotated[Sequence[str], typer.Option(metavar="METHOD")],
    out: str = "runs/sweep",
    seeds: Positive = 1,
    plan: bool = False,
    yes: bool = False,
    workers: Positive = 1,
    min_workers: Positive | None = None,
    cluster: bool = False,
    quiet: bool = False,
    json_logs: bool = False,
    verbose: bool = False,
    **options: Sequence[str],
) -> None:
    """Train a grid of models, or search in it, test every result, and print one table.

    Every option of training takes several values with commas between, a setting of a method several with | between, and
    each combination is trained once. A search also takes ranges, LOW..HIGH. The shell would read | and spaces itself:
    put such values into quotes, as here. The same command goes on with a sweep that was interrupted, and what --out
    holds is not trained again by a larger grid.

    \b
    Examples:
      rayclip sweep --method tecoa --method 'mmcoa:lambda_img=0.1|0.5|0.9' --eps 1/255,2/255,4/255 --shots 1,5,full \\
        --seeds 3 --model ViT-B-32:openai --data imagenet --test cifar10,dtd --plan
      rayclip sweep --method tecoa,fare --lr 1e-6,1e-5 --batch-size 128,256 --betas '0.9,0.98|0.9,0.999' \\
        --model digits --data digits --eps 32/255 --out runs/recipes
      rayclip sweep --method 'mmcoa:lambda_img=0.1..0.9' --lr 1e-6..1e-4 --search asha --samples 64 --by 'worst case' \\
        --model ViT-B-32:openai --data imagenet --test cifar10,dtd --cluster

    Args:
        method: Repeat for several, or commas between; settings with | between several values.
        seeds: Train each combination with so many seeds, from --seed on; the table has mean ± standard deviation.
        plan: Only show the trials and estimate what is left to do, measured for some seconds.
        yes: Begin even if there are more than 100 trials.
        workers: Train workers of each trial (one GPU each where there are GPUs).
    """
    check_folder("--out", out)
    given: dict[str, Any] = {name: values for name, values in options.items() if values}
    given["model"], given["data"] = split_models(options["model"]), split_places(options["data"])
    grid = Grid.read(method, given, seeds=seeds)
    if settings.search is None:
        grid.check_values()
    elif seeds > 1:
        raise UserError("--search compares single trainings: leave --seeds away, and train what it finds with --seeds.")
    trials = grid.size if settings.search is None else min(settings.samples, grid.size)
    if trials > MANY and not (plan or yes):
        raise UserError(
            f"these are {trials} trials, more than {MANY}: --plan estimates how many GPU hours they take, and --yes "
            "begins them."
        )
    check_models(given["model"])
    tests = split_places(settings.test)
    check_data([*given["data"], *tests])

    from rayclip import api
    from rayclip.api.sweeping import prepare

    made = prepare(grid, settings, out)
    where = api.Where(
        out=out,
        tracking=logging.tracking,
        cluster=cluster,
        train_workers=workers,
        least_workers=least_of(min_workers, workers),
        quiet=quiet,
        verbose=verbose,
    )
    if plan:
        show_plan(made.plan(where))
        return
    found = made.run(where)

    from rayclip.progress import say
    from rayclip.reports.seeds import seed_grids
    from rayclip.reports.to_terminal import show

    if isinstance(found, api.Found):
        api.show_search(found)
    show(seed_grids(found.rows, found.labels, found.groups))
    if isinstance(found, api.Found) and found.front:
        best = max(found.front, key=lambda name: found.scores[name].by(settings.by))
        spec = next(spec for spec, name in found.labels.items() if name == best)
        print(f"best by {settings.by}: {best}: --model {spec}")
    print(f"results: {out}")
    if logging.tracking is not None:
        print(f"MLflow:  rayclip ui --experiment {logging.experiment} --tracking-uri {logging.tracking.uri}")
    for name, error in found.errors.items():
        say("error", f"{name} failed: {error}")
    if found.errors:
        raise typer.Exit(1)


def show_plan(plan: "StudyPlan") -> None:
    """Print the trials of a sweep, those of one name in one row, and what is left to do."""
    unit = plan.hardware.unit

    def hours(seconds: float) -> str:
        found = seconds / 3600
        return f"{found:.3g}" if found >= _LEAST else f"<{_LEAST:g}"

    from rayclip.api.needs import FIRST_IMAGES

    rows = []
    for name in dict.fromkeys(trial.name for trial in plan.trials):
        alike = [trial for trial in plan.trials if trial.name == name]
        left = [trial for trial in alike if not trial.finished]
        cost = hours(sum(trial.seconds for trial in left)) if left else "finished"
        rows.append((name, len(alike), alike[0].epochs, alike[0].images, cost))
    if rows:
        print_grid(("", "trials", "epochs", "images", f"{unit} hours"), rows)
    done, upto = sum(trial.finished for trial in plan.trials), "at most" if plan.at_most else "about"
    print(f"{len(plan.trials)} trials, {done} of them finished; {plan.models} models to test, {plan.cells} cells each")
    print(
        f"{upto} {hours(plan.training + plan.testing)} {unit} hours on "
        f"{plan.hardware}: {hours(plan.training)} of training, {hours(plan.testing)} of tests"
    )
    show_needs(plan.needs, upto)
    trial, first = plan.first
    trained = f"{trial.name} and " if trial is not None else ""
    print(
        f"first milestone, {trained}the untouched model on {FIRST_IMAGES} images of each data set (--limit): about "
        f"{hours(first.training + first.testing)} {unit} hours here; {_on_cards(first.needs)}"
    )


def show_needs(needs: "Needs", upto: str = "about") -> None:
    """Print GPU hours by kind of card, disk, memory and number of files."""
    from rayclip.api.needs import SHARE_BF16, SHARE_FP32

    print(
        f"{upto} {_on_cards(needs)}: {needs.training + needs.testing:.2g} operations at {SHARE_BF16:.0%} of the cards' "
        f"peak in bf16 (training) and {SHARE_FP32:.0%} in fp32 (tests), as an H100 had with ViT-B/32, if "
        "every image is attacked"
    )
    print(
        f"{needs.disk / 1e9:.2g} GB of results and checkpoints in {needs.files:,} files, and the checkpoints once more "
        f"in MLflow's store; {needs.memory / 1e9:.2g} GB of memory a worker"
    )


def _on_cards(needs: "Needs") -> str:
    from rayclip.api.needs import CARDS

    hours = [(card.name, card.hours(needs.training, needs.testing)) for card in CARDS]
    return ", ".join(f"{found:.3g} h on {name}" for name, found in hours)


def _described(name: str) -> str:
    """Return what `rayclip train` says of an option."""
    for owner in (train, RecipeOptions, ConfigOptions):
        found = read_docstring(owner.__doc__)[1].get(name)
        if found:
            return found
    return ""


def _with_training_options(command: Any) -> Any:
    """Add an option for each option of training, described as in `rayclip train`, to a function that takes them as
    keywords."""
    *own, _ = inspect.signature(command).parameters.values()
    added = []
    for name, kind in OPTIONS.items():
        metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else "VALUES"
        names = ["--batch-size", "--batch"] if name == "batch_size" else []
        info = typer.Option(*names, metavar=metavar, help=_described(name) or None)
        required = name in ("model", "data")
        default = inspect.Parameter.empty if required else ()
        annotation = Annotated[Sequence[str], info]
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *added)])
    return command


def add_to(app: typer.Typer) -> None:
    """Add the command to an application."""
    add_command(app, "sweep", _with_training_options(sweep), experiment="rayclip-sweep")

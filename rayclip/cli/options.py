"""Options shared by several commands, and checks of their values."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rayclip.names import ATTACKS_ABOUT, DATASETS, DEFENSES_ABOUT, METHODS
from rayclip.paths import check_folder, check_stream, split_places
from rayclip.types import UserError
from rayclip.units import parse_budget

Model = (
    "digits (bundled), local-dir:PATH, hf-hub:ORG/NAME, an open_clip NAME:TAG such as ViT-B-32:openai, "
    "NAME-quickgelu:FILE or NAME-gelu:FILE with a file of weights, or prompted:PATH (what advpt and vp learn)."
)
Eps = Annotated[str | None, typer.Option(help="Budget in pixel units, as a fraction: 1/255.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--eps",
        metavar="N/255,…",
        help="Budgets in pixel units, as fractions, commas between: 1/255,2/255. Every attack that names none of its "
        "own (pgd-l2:eps=128/255) is run at each.",
    ),
]
StepSize = Annotated[
    str | None,
    typer.Option(
        "--step-size",
        help="Length of an attack step.  [default: 1/255, or 2.5·eps/steps in l_2 and where steps of 1/255 do not "
        "cross the ball]",
    ),
]
Cluster = Annotated[bool, typer.Option("--cluster", help="Use the running Ray cluster (RAY_ADDRESS or this node's).")]
MinWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Continue with this many workers while the cluster has no room for all.  [default: wait for all]",
        show_default=False,
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option(help="MLflow store or server.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here]"),
]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Log nothing to MLflow now; rayclip log can later.")]
Experiment = Annotated[str, typer.Option(help="MLflow experiment.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
JsonLogs = Annotated[  # read by `cli.run`
    bool,
    typer.Option("--json-logs", help="Progress, notes and errors as JSON objects, one per line, on standard error."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also print the output of Ray and its workers.")]
Substitutes = Annotated[
    str,
    typer.Option(
        help="Source of replacement words: clip-table, or a masked language model's hub name or folder.  "
        "[default: clip-table for digits, else bert-base-uncased]",
        show_default=False,
    ),
]


Resolution = Annotated[
    Literal["native", "model"],
    typer.Option(help="Perturb images at their own size (native), or resize them to the model's input first (model)."),
]

Resize = Annotated[
    Literal["antialias", "plain"],
    typer.Option(
        help="Resize native images to the model's input as PIL does (antialias), or as the code of TeCoA and MMCoA "
        "does (plain: bicubic without anti-aliasing)."
    ),
]

ClassNames = Annotated[
    str,
    typer.Option(
        metavar="curated|raw|FILE",
        help="Spell the classes as CLIP does (curated), or as the data set itself and the papers' code "
        "(raw); or a FILE of names, "
        "one per line in label order or a JSON list, for data that carry none.",
    ),
]

Out = Annotated[str, typer.Option(help="Folder or URI of the results; what is there is not computed again.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write the rows to FILE; - is standard output.")
]
AttackSteps = Annotated[int, typer.Option(min=1, help="Steps of attacks that name none.")]


def _names(known: Iterable[str], group: str = "") -> Callable[[str], list[str]]:
    """Return a shell completion for names, also in lists and chains, including those of an entry-point group."""

    def complete(incomplete: str) -> list[str]:
        from importlib.metadata import entry_points

        before = "".join(re.findall(r"^.*[,+]", incomplete))
        return [before + name for name in (*known, *(e.name for e in entry_points(group=f"rayclip.{group}")))]

    return complete


complete_models = _names(["digits"])
complete_data = _names(DATASETS, "datasets")
complete_attacks = _names(ATTACKS_ABOUT, "attacks")
complete_defenses = _names(["none", *DEFENSES_ABOUT], "defenses")
complete_methods = _names(METHODS, "methods")

Models = Annotated[
    list[str],
    typer.Option(
        metavar="MODEL", help=f"Repeat for several, or commas between. {Model}", autocompletion=complete_models
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        metavar="DATA",
        help="Data set names or Parquet files (Hugging Face layout); repeat for several, or commas between.",
        autocompletion=complete_data,
    ),
]
Attacks = Annotated[
    list[str],
    typer.Option(
        metavar="ATTACKS",
        help="Names with settings: clean,pgd:steps=100,step=1/255,pgd-l2:eps=128/255,bert.",
        autocompletion=complete_attacks,
    ),
]
ATTACKS = ["clean,pgd"]  # the default of `--attacks`
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many images of each data set.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]


def budget_of(eps: str | None) -> float | None:
    """Parse `--eps`; None if it was not given."""
    return None if eps is None else parse_budget(eps)


def attack_defaults(steps: int, step_size: str | None, substitutes: str) -> dict[str, Any]:
    """Return the defaults for settings that attacks do not set; without a step size, each attack has its own."""
    step = {} if step_size is None else {"step": parse_budget(step_size, "step-size")}
    return {"steps": steps, "substitutes": substitutes, **step}


def one_list(values: Sequence[str]) -> str:
    """Join the values of a repeatable option with commas."""
    return ",".join(values)


def split_models(values: Sequence[str]) -> list[str]:
    """Split models at commas, but not the name of an existing folder that contains a comma."""

    def exists(path: Path) -> bool:
        kind, colon, place = str(path).partition(":")
        return Path(place).exists() if colon and "," not in kind else path.exists()

    return split_places(values, exists)


def refuse_repeats(command: Any, arguments: Sequence[str]) -> None:
    """Raise a `UserError` if an option that takes one value is given twice: click would silently use the last one.

    Args:
        command: a click command (`typer.main.get_command`), or a group, in which the arguments name the command.
    """
    left = list(arguments)
    while left and left[0] in getattr(command, "commands", {}):
        command = command.commands[left.pop(0)]
    kinds = {
        name: option
        for option in command.params
        if getattr(option, "param_type_name", "") == "option"
        for name in (*option.opts, *option.secondary_opts)
    }
    seen: set[str] = set()
    while left and left[0] != "--":
        name, equals, _ = left.pop(0).partition("=")
        option = kinds.get(name)
        if option is None or option.multiple or option.is_flag:
            left = left if option is None or equals or option.is_flag else left[1:]
            continue
        if option.name in seen:
            raise UserError(f"{name} is given twice and takes one value: leave one.")
        seen.add(option.name)
        left = left if equals else left[1:]


def least_of(min_workers: int | None, workers: int) -> int | None:
    """Return `--min-workers`; raise a `UserError` if it is more than `--workers`."""
    if min_workers is not None and min_workers > workers:
        raise UserError(f"--min-workers {min_workers} is more than --workers {workers}.")
    return min_workers


def check_places(out: str, json: str | None) -> None:
    """Raise a `UserError` if results could not be written to these places."""
    if json not in (None, "-"):
        check_stream("--json", str(json))
    check_folder("--out", out)


def check_models(specs: Sequence[str]) -> None:
    """Raise a `UserError` for a model that is no valid specification or names a folder that does not exist.

    Whether an existing model can be loaded is checked later.
    """
    for spec in specs:
        kind, colon, place = spec.partition(":")
        if not colon and spec != "digits":
            here = Path(spec).expanduser()
            hint = f" (or did you mean local-dir:{spec}?)" if here.is_dir() else ""
            raise UserError(
                f"unknown model '{spec}'{hint}: use digits, local-dir:PATH, hf-hub:ORG/NAME or an open_clip NAME:TAG "
                "such as ViT-B-32:openai."
            )
        if kind in ("local-dir", "prompted") and "://" not in place and not Path(place).expanduser().is_dir():
            raise UserError(f"model '{spec}': there is no folder {place}.")


def check_data(specs: Sequence[str], *, pairs: bool = False) -> None:
    """Raise a `UserError` for data that does not exist; its content is checked later."""
    from rayclip.data import locate, open_data, open_pairs
    from rayclip.data.spec import parse_spec

    for spec in specs:
        place = parse_spec(locate(spec)).place
        if "://" in place or place == "digits" or Path(place).exists():
            continue
        if pairs:
            open_pairs(spec)
        else:
            open_data(spec, "test")


def check_tracking(uri: str | None, no_tracking: bool) -> None:
    """Raise a `UserError` if MLflow can never log to this address; whether it answers is checked later."""
    if no_tracking:
        return
    from rayclip.tracking.address import check_address, default_uri

    check_address(uri or default_uri())


def hand_out(json: str | None, rows: str, show: Callable[[], None]) -> None:
    """Write rows to the `--json` file and show them; `-` writes them to standard output and shows nothing else.

    The rows are shown even if the file cannot be written.

    Raises:
        UserError: the file cannot be written.
    """
    if json == "-":
        print(rows, end="")
        return
    failed = None if json is None else _write(Path(json).expanduser(), rows)
    show()
    if failed is not None:
        raise UserError(
            f"--json {json} cannot be written ({failed.strerror or failed}): make room or mend the rights, and run "
            "again; what is finished is not computed again."
        )


def _write(path: Path, text: str) -> OSError | None:
    """Write a file atomically, or a device or pipe in place; return the error, if any."""
    from rayclip.store import Store

    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            path = path.resolve()
            Store(str(path.parent)).write(path.name, text.encode())
    except OSError as error:
        return error
    return None

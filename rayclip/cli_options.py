"""Options that several commands have."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from rayclip.names import ATTACKS_ABOUT, DATASETS, DEFENSES_ABOUT, METHODS
from rayclip.types import UserError
from rayclip.units import parse_budget

Model = (
    "digits (bundled), local-dir:PATH, hf-hub:ORG/NAME, an open_clip NAME:TAG such as ViT-B-32:openai, or "
    "prompted:PATH (what advpt and vp learn)."
)
Eps = Annotated[str | None, typer.Option(help="Budget in pixel units, as a fraction: 1/255.")]
StepSize = Annotated[
    str | None,
    typer.Option(
        "--step-size",
        help="Length of an attack step.  [default: 1/255, or 2.5·eps/steps in a ball that so many do not cross]",
    ),
]
Cluster = Annotated[bool, typer.Option("--cluster", help="Use the running Ray cluster (RAY_ADDRESS or this node's).")]
MinWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Go on from the last checkpoint with so many workers while the cluster has no room for all.  "
        "[default: wait for all]",
        show_default=False,
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option(help="MLflow store or server.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here]"),
]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Log nothing to MLflow.")]
Experiment = Annotated[str, typer.Option(help="MLflow experiment.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
JsonLogs = Annotated[  # `cli.run` looks for it
    bool, typer.Option("--json-logs", help="Progress, notes and errors as JSON objects, one a line, on standard error.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also print what Ray and its workers say.")]
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
    typer.Option(help="native: perturb at the images' own size; model: resize to the model's input first."),
]

Resize = Annotated[
    Literal["antialias", "plain"],
    typer.Option(
        help="Of native images to the model's input: antialias as PIL, plain as the code of TeCoA and MMCoA (bicubic "
        "without anti-aliasing)."
    ),
]

ClassNames = Annotated[
    Literal["curated", "raw"],
    typer.Option(help="Spelling of the classes: CLIP's, or the data set's own (that of the papers' code)."),
]

Out = Annotated[str, typer.Option(help="Folder or URI of the results; what is there is not computed again.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write the rows to FILE; - is standard output.")
]
AttackSteps = Annotated[int, typer.Option(min=1, help="Steps of the attacks that do not name their own.")]


def _names(known: Iterable[str], group: str = "") -> Callable[[str], list[str]]:
    """What a shell offers: names, in lists and chains too, and those of other packages in an entry-point group."""

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

Models = Annotated[list[str], typer.Option(help=f"Repeat for several. {Model}", autocompletion=complete_models)]
Data = Annotated[
    str,
    typer.Option(
        help="Data set names or Parquet files (Hugging Face layout), commas between.", autocompletion=complete_data
    ),
]
Attacks = Annotated[
    str,
    typer.Option(help="Names with settings: clean,pgd:steps=100,step=1/255,bert,sep.", autocompletion=complete_attacks),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many images of each data set.")]
Seed = Annotated[int, typer.Option(min=0)]


def budget_of(eps: str | None) -> float | None:
    """What `--eps` says; None where it was not given."""
    return None if eps is None else parse_budget(eps)


def default_step(written: str | None, eps: float | None, steps: int) -> float:
    """The papers' 1/255; in a ball that so many of those do not cross, 2.5·eps/steps (Madry et al. 2018)."""
    if written:
        return parse_budget(written, "step-size")
    eps = eps or 0.0
    return 1 / 255 if steps / 255 >= 2 * eps else 2.5 * eps / steps


def least_of(min_workers: int | None, workers: int) -> int | None:
    """What `--min-workers` says, which may not be more than `--workers`."""
    if min_workers is not None and min_workers > workers:
        raise UserError(f"--min-workers {min_workers} is more than --workers {workers}.")
    return min_workers


def check_places(out: str, json: str | None) -> None:
    """Raise a `UserError` if results could not be written there."""
    if json not in (None, "-") and not Path(json).absolute().parent.is_dir():
        raise UserError(f"--json {json}: there is no folder {Path(json).absolute().parent}.")
    check_folder("--out", out)


def check_folder(option: str, place: str) -> None:
    """Raise a `UserError` if a folder could not be made there; an object store's URI may be anything."""
    if "://" in place:
        return
    path = Path(place).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{option} {place}: {'that' if there == path else there} is a file: give a folder.")


def wrote_json(json: str | None, rows: str) -> bool:
    """Write the rows where `--json` says; whether that is standard output, which then holds nothing else."""
    if json == "-":
        print(rows, end="")
    elif json is not None:
        Path(json).write_text(rows)
    return json == "-"

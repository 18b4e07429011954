"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rayclip.types import UserError

Model = (
    "digits (bundled), local-dir:PATH, hf-hub:ORG/NAME, an open_clip NAME:TAG such as ViT-B-32:openai, or "
    "prompted:PATH (what advpt and vp learn)."
)
Eps = Annotated[str | None, typer.Option(help="Budget in pixel units, as a fraction: 1/255.")]
StepSize = Annotated[
    str | None,
    typer.Option(
        "--step-size", help="Length of an attack step.  [default: 1/255, or 2.5·eps/steps where that is larger]"
    ),
]
Cluster = Annotated[bool, typer.Option("--cluster", help="Use the running Ray cluster (RAY_ADDRESS or this node's).")]
Tracking = Annotated[
    str | None,
    typer.Option(help="MLflow store or server.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here]"),
]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Log nothing to MLflow.")]
Experiment = Annotated[str, typer.Option(help="MLflow experiment.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
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

ClassNames = Annotated[
    Literal["curated", "raw"],
    typer.Option(help="Spelling of the classes: CLIP's, or the data set's own (that of the papers' code)."),
]

Out = Annotated[str, typer.Option(help="Folder or URI of the results; what is there is not computed again.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write the rows to FILE; - is standard output.")
]
AttackSteps = Annotated[int, typer.Option(min=1, help="Steps of the attacks that do not name their own.")]


def check_places(out: str, json: str | None) -> None:
    """Raise a `UserError` if results could not be written there."""
    if json not in (None, "-") and not Path(json).absolute().parent.is_dir():
        raise UserError(f"--json {json}: there is no folder {Path(json).absolute().parent}.")
    if Path(out).is_file():
        raise UserError(f"--out {out} is a file: give a folder.")


def wrote_json(json: str | None, rows: str) -> bool:
    """Write the rows where `--json` says; whether that is standard output, which then holds nothing else."""
    if json == "-":
        print(rows, end="")
    elif json is not None:
        Path(json).write_text(rows)
    return json == "-"

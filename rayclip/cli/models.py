"""`rayclip import` and `rayclip interpolate`: convert other codes' checkpoints, and evaluate interpolated weights."""

from pathlib import Path
from typing import Annotated

import typer

from rayclip.cli.options import Model, complete_models, hand_out, one_list
from rayclip.cli.request import Request
from rayclip.paths import check_folder
from rayclip.types import UserError

_SHARES = ["0,0.25,0.5,0.75,1"]


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A checkpoint of TeCoA's, PMG-AFT's, TGA-ZSR's, SAFT's, MMCoA's or RobustVLM's code, of open_clip or "
            "Lightning, OpenAI's archive, a state dict (.pt, .safetensors), or hf-hub:ORG/NAME.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    base: Annotated[
        str | None, typer.Option(help="The model that FILE was fine-tuned from, such as ViT-B-32:openai.")
    ] = None,
    allow_gelu: Annotated[
        bool, typer.Option("--allow-gelu", help="FILE was fine-tuned from this base, which is no OpenAI model.")
    ] = False,
) -> None:
    """Convert another code's checkpoint to ours (`local-dir:OUT`); files that could run code are refused."""
    check_folder("--out", str(out), done="rayclip.json")

    from rayclip.models.checkpoint import read_lineage, save_checkpoint
    from rayclip.models.imports import import_model

    clip, lineage = import_model(source, base, allow_gelu=allow_gelu)
    there = read_lineage(out)
    if there is not None and there.get("imported") != lineage["imported"]:
        raise UserError(f"{out} holds another checkpoint: choose another --out, or delete it.")
    if there is not None:
        print(f"{out} already holds this checkpoint; nothing to do.")
        return
    save_checkpoint(clip, out, lineage)
    found = lineage["imported"]
    if "layout" in found:
        part = "the image tower" if found["part"] == "image" else "the whole CLIP"
        left = f"; left: {', '.join(found['left'])}" if found["left"] else ""
        behind = f" behind '{found['prefix']}'" if found["prefix"] else ""
        print(f"{source}: {part}, {found['keys']} tensors of '{found['layout']}'{behind}{left}")
    print(f"checkpoint: {out}")
    print(f"evaluate it: rayclip eval --model local-dir:{out} --data TEST.parquet --eps 1/255 --out {out}/eval")


def interpolate(
    asked: Request,
    origin: Annotated[str, typer.Option("--from", help=f"The model at a = 0. {Model}", autocompletion=complete_models)],
    target: Annotated[
        str, typer.Option("--to", help="The model at a = 1, fine-tuned from that one.", autocompletion=complete_models)
    ],
    a: Annotated[list[str], typer.Option("--a", metavar="A,A…", help="Numbers from 0 to 1, commas between.")] = _SHARES,
) -> None:
    """Evaluate the weights (1-a)·FROM + a·TO at each a: the trade-off of clean and robust accuracy."""
    from rayclip import api
    from rayclip.reports.rows import rows_json, show_rows

    models = mixes(origin, target, one_list(a))
    rows = api.compare(f"interpolate {origin} to {target}", models, [asked.evaluation], asked.where)

    def show() -> None:
        show_rows(rows, models)
        print(f"results: {asked.out}")

    hand_out(asked.json, rows_json(rows), show)


def mixes(start: str, end: str, a: str, label: str = "") -> dict[str, str]:
    """Return row labels (`LABEL a = 0.25`) by specification of the interpolated models, in order of a.

    Raises:
        UserError: `a` is not a list of numbers from 0 to 1.
    """
    from rayclip.models.specs import mix_spec

    try:
        values = sorted({float(part) for part in a.split(",")})
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"--a {a} holds something else than numbers from 0 to 1: write 0,0.25,0.5,0.75,1.")
    return {mix_spec(start, end, value): f"{label} a = {value:g}".strip() for value in values}

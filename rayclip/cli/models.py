"""`rayclip models`, `import`, `export`, `interpolate` and `uap`: the zoo, checkpoints from and to other codes,
interpolated weights, universal perturbations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from rayclip.cli.command import MODELS, Positive, add_command, command_group
from rayclip.cli.options import check_models, hand_out, print_table, split_models
from rayclip.cli.request import Request
from rayclip.names import check_template
from rayclip.paths import check_file, check_folder
from rayclip.types import UserError

app = command_group("List the published robust CLIPs that zoo:NAME loads, or show one.")


def list_(json: str | None = None) -> None:
    """List the published robust CLIPs, each usable as --model zoo:NAME; accuracies in %, robust within 1, 2, 4/255."""
    from rayclip.models.zoo import zoo, zoo_json

    columns = "name,architecture,size,method,against,trained on,clean,1,2,4,licence,source"
    rows = [columns.split(",")] + [
        [
            *(m.name, m.architecture, str(m.image_size), m.method, m.trained_against, m.trained_on),
            *("" if number is None else f"{number:.1f}" for number in (m.clean, m.robust_1, m.robust_2, m.robust_4)),
            *(m.licence, m.source),
        ]
        for m in zoo().values()
    ]

    def show() -> None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:  # wider than most terminals, which fold lines and lose nothing
            print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
        print("\nrayclip models show NAME says where its numbers come from, and how to get it")

    hand_out(json, zoo_json(), show)


def show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Show everything that is known of a published robust CLIP, and how to load it."""
    from dataclasses import asdict

    from rayclip.models.zoo import find_published

    found = find_published(name)
    print_table(
        [(key.replace("_", " "), str(value)) for key, value in asdict(found).items() if value not in ("", None)]
    )
    is_there = found.is_on_hub or found.own_folder.is_dir()
    print(f"\n{f'load it: --model {found.spec}' if is_there else found.how_to_get()}")


def import_(
    source: Annotated[str, typer.Argument(metavar="FILE")],
    out: Path,
    base: str | None = None,
    allow_gelu: bool = False,
) -> None:
    """Convert another code's checkpoint to ours (`local-dir:OUT`); files that could run code are refused.

    Args:
        source: A checkpoint of TeCoA's, PMG-AFT's, TGA-ZSR's, SAFT's, MMCoA's or RobustVLM's code, of open_clip or
            Lightning, OpenAI's archive, a state dict (.pt, .safetensors), a folder with a CLIPVisionModel of
            transformers, hf:ORG/NAME or hf-hub:ORG/NAME.
        out: Folder of the checkpoint.
        base: The model that FILE was fine-tuned from, such as ViT-B-32:openai.
        allow_gelu: FILE was fine-tuned from this base, which is no OpenAI model.
    """
    check_folder("--out", str(out), done="rayclip.json")

    from rayclip.models.checkpoint import read_lineage, save_checkpoint
    from rayclip.models.imports import import_model

    clip, lineage = import_model(source, base, allow_gelu=allow_gelu)
    there, found = read_lineage(out), lineage["imported"]
    if there is not None:
        if there.get("imported") != found:
            raise UserError(f"{out} holds another checkpoint: choose another --out, or delete it.")
        print(f"{out} already holds this checkpoint; nothing to do.")
        return
    save_checkpoint(clip, out, lineage)
    if "layout" in found:
        part = "the image tower" if found["part"] == "image" else "the whole CLIP"
        left = f"; left: {', '.join(found['left'])}" if found["left"] else ""
        behind = f" behind '{found['prefix']}'" if found["prefix"] else ""
        print(f"{source}: {part}, {found['keys']} tensors of '{found['layout']}'{behind}{left}")
    print(f"checkpoint: {out}")
    print(f"evaluate it: rayclip eval --model local-dir:{out} --data TEST.parquet --eps 1/255 --out {out}/eval")


class Layout(StrEnum):
    open_clip = "open_clip"
    transformers = "transformers"
    vision = "transformers-vision"


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    out: Path,
    layout: Annotated[Layout, typer.Option("--format")],
) -> None:
    """Write a model for other code: as open_clip's folder, as CLIPModel of transformers, or its image tower alone.

    Args:
        model: A checkpoint's folder, or any model as rayclip eval takes it.
        out: Folder of the result.
        layout: open_clip; transformers (CLIPModel, CLIPProcessor); transformers-vision (CLIPVisionModel, as in LLaVA).
    """
    spec = f"local-dir:{model}" if Path(model).is_dir() else model
    check_models([spec])
    check_folder("--out", str(out), done="rayclip.json")

    from rayclip.models import load_model
    from rayclip.models.checkpoint import model_record, read_lineage
    from rayclip.models.exporting import export_model

    clip = load_model(spec)
    there, wanted = read_lineage(out), {"format": layout.value, "fingerprint": clip.fingerprint()}
    if there is None:
        export_model(clip, out, layout.value, model_record(spec)["lineage"] or {})
    elif there.get("exported") != wanted:
        raise UserError(f"{out} holds another checkpoint: choose another --out, or delete it.")
    print(f"{'already there' if there else 'written'}: {out}")


@dataclass(frozen=True, kw_only=True)
class Interpolation(Request):
    """An evaluation of models between two others.

    Attributes:
        target: The model at a = 1, fine-tuned from that one.
        a: Numbers from 0 to 1, commas between.
    """

    model: Sequence[str] = field(init=False, default=())
    origin: Annotated[str, typer.Option("--from", help=f"The model at a = 0. {MODELS}")]
    target: Annotated[str, typer.Option("--to")]
    a: Annotated[Sequence[str], typer.Option("--a", metavar="A,A…")] = ("0,0.25,0.5,0.75,1",)

    @property
    def models(self) -> list[str]:
        return split_models([self.origin, self.target])


def interpolate(asked: Interpolation) -> None:
    """Evaluate the weights (1-a)·FROM + a·TO at each a: the trade-off of clean and robust accuracy."""
    from rayclip import api
    from rayclip.reports.rows import rows_json, show_rows

    models = mixes(asked.origin, asked.target, ",".join(asked.a))
    rows = api.compare(f"interpolate {asked.origin} to {asked.target}", models, [asked.evaluation], asked.where())

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


def uap(
    model: Annotated[str, typer.Option(help=MODELS)],
    data: str,
    out: Path,
    eps: str = "8/255",
    step_size: str | None = None,
    epochs: Positive = 2,
    batch: Positive = 64,
    limit: Positive | None = None,
    template: str | None = None,
    objective: Literal["embedding", "labels"] = "embedding",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Make one perturbation for all images of a model and data set; `--attacks uap:file=OUT` adds it.

    Args:
        data: Data set whose train images are used.
        out: File to write, .safetensors.
        eps: Budget in l_inf, as a fraction.
        step_size: Length of a step, as a fraction. [default: a quarter of eps]
        epochs: Passes over the images.
        batch: Images per step.
        limit: Use at most this many images.
        template: Template of the class prompts, for --objective labels. [default: the papers']
        objective: Away from the clean embedding (embedding), or from the true class (labels).
        seed: Of the start and of the order of images.
        device: Where the model runs; auto is the GPU if there is one.
    """
    from rayclip.units import parse_budget

    budget = parse_budget(eps, "--eps")
    length = budget / 4 if step_size is None else parse_budget(step_size, "--step-size")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: write a file that ends in .safetensors.")
    check_file("--out", out)
    if template is not None:
        check_template(template)
    check_models([model])

    from rayclip.api.uap import make_perturbation

    shown = make_perturbation(
        model,
        data,
        out,
        eps=budget,
        step=length,
        epochs=epochs,
        batch=batch,
        limit=limit,
        template=template,
        objective=objective,
        seed=seed,
        device=device,
    )
    print(f"{out}: {shown}")
    print(
        f"evaluate it: rayclip eval --model {model} --data {data} --attacks clean,uap:file={out} --eps {eps} --out DIR"
    )


add_command(app, "list", list_)
add_command(app, "show", show)

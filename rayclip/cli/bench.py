"""`rayclip bench`: measure the rates of attacks, training steps and a whole evaluation on this machine."""

import json as jsons
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.cli.command import Positive
from rayclip.cli.options import hand_out, print_grid, split
from rayclip.paths import check_stream
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.api.bench import BenchResult

_SLOWER = 0.8  # of an earlier ratio or rate: below, it is called slower
_SETTINGS = ("name", "gpus", "cores", "model", "data", "batch", "eps", "compiled")  # in which two results must agree


def bench(
    model: str = "digits",
    data: str = "digits",
    attacks: Sequence[str] = ("pgd:stop=final,apgd-ce",),
    methods: Sequence[str] = ("tecoa",),
    eps: str = "8/255",
    batch: Positive = 64,
    precision: Sequence[str] = ("fp32",),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    whole: bool = True,
    against: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Measure attacks, training steps and a whole evaluation on this machine, beside plain loops.

    \b
    Examples:
      rayclip bench
      rayclip bench --model ViT-B-32:random --batch 256 --eps 1/255 --precision fp32,bf16 --compile --json now.json
      rayclip bench --json now.json --against before.json

    Args:
        model: A model, or NAME:random: an architecture of open_clip with random weights.
        data: Data set whose test images and classes are used.
        attacks: Attacks, with their settings.
        methods: Training methods whose step is measured; none: no step.
        eps: Budget of attacks and methods, as a fraction.
        batch: Images per batch.
        precision: fp32, bf16 or fp16, commas between.
        device: Where models run; auto is the GPU if there is one.
        compiled: Attack a compiled copy (torch.compile).
        whole: Measure a whole evaluation on Ray and MLflow, too.
        against: Compare with an earlier --json of the same machine and settings.
    """
    from rayclip.units import parse_budget

    precisions = list(split(precision))
    if unknown := [each for each in precisions if each not in ("fp32", "bf16", "fp16")]:
        raise UserError(f"--precision {unknown[0]}: write fp32, bf16 or fp16.")
    if json not in (None, "-"):
        check_stream("--json", str(json))
    earlier = _read(against)
    budget = parse_budget(eps)

    import torch

    from rayclip.api.bench import Bench
    from rayclip.api.bench import bench as measure
    from rayclip.attacks import parse_attacks
    from rayclip.methods import METHODS
    from rayclip.progress import say

    usual = {"substitutes": "clip-table", "captions": "templates"}  # of those that have such settings
    chosen = ",".join(methods)
    found = measure(
        Bench(
            model=model,
            data=data,
            attacks=parse_attacks(",".join(attacks), usual),
            methods=[] if chosen == "none" else METHODS.parse(chosen, usual | {"eps": budget}),
            eps=budget,
            batch=batch,
            precisions=precisions,
            device=device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
            compiled=compiled,
            whole=whole,
        ),
        lambda rate: None if quiet else say("note", f"{rate.name} {rate.precision}: {rate.images_per_s:.3g} images/s"),
    )
    hand_out(json, jsons.dumps(found.to_json(), indent=1) + "\n", lambda: _show(found, earlier))


def _read(place: str | None) -> dict[str, Any] | None:
    if place is None:
        return None
    try:
        found = jsons.loads(Path(place).read_text())
        return {**found, "rates": {(r["kind"], r["name"], r["precision"]): r for r in found["rates"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against {place} cannot be read ({error}): give what `rayclip bench --json` wrote."
        ) from error


def _show(found: "BenchResult", earlier: dict[str, Any] | None) -> None:
    from rayclip.reports.grid import Cell, number_cell

    def cell(value: float | None, form: str) -> Cell:
        return Cell() if value is None else number_cell(value, form)

    about = found.about
    matrix = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in found.matrix.items())
    print(
        f"{about['name']}, torch {about['torch']}: matrix products {matrix} TFLOP/s; copy {found.copy / 1e9:.3g} GB/s"
    )
    columns: dict[str, list[Cell]] = {
        "precision": [Cell(text=rate.precision) for rate in found.rates],
        "images/s": [number_cell(rate.images_per_s, ".4g") for rate in found.rates],
        "% of matrix rate": [cell(rate.share and 100 * rate.share, ".0f") for rate in found.rates],
        "% judging": [cell(rate.judging and 100 * rate.judging, ".0f") for rate in found.rates],
        "GB": [cell(rate.gigabytes, ".1f") for rate in found.rates],
        "waits": [cell(rate.waits, "d") for rate in found.rates],
        "plain": [cell(rate.plain_per_s, ".4g") for rate in found.rates],
        "× plain": [cell(rate.plain_per_s and rate.images_per_s / rate.plain_per_s, ".1f") for rate in found.rates],
    }
    if earlier is not None:
        before = [earlier["rates"].get((r.kind, r.name, r.precision), {}).get("images_per_s") for r in found.rates]
        columns["× earlier"] = [
            cell(then and rate.images_per_s / then, ".2f") for rate, then in zip(found.rates, before, strict=True)
        ]
    columns = {name: cells for name, cells in columns.items() if any(each.text for each in cells)}
    names = [f"{rate.name} step" if rate.kind == "method" else rate.name for rate in found.rates]
    print_grid(("", *columns), list(zip(names, *columns.values(), strict=True)))
    if found.whole:
        rest = found.whole["all"] - found.whole["pool"]
        print(f"whole evaluation: {found.whole['all']:.1f} s, of which {rest:.1f} s before and after the workers")
    if earlier is not None:
        for line in _slower(found, earlier):
            print(line)


def _slower(found: "BenchResult", earlier: dict[str, Any]) -> list[str]:
    """Say what is slower than before: beside the plain loop of the same run where there is one, since machines vary."""
    differ = [name for name in _SETTINGS if found.about.get(name) != earlier["about"].get(name)]
    if differ:
        return [f"not compared: another {', '.join(differ)} than --against."]
    lines = []
    for rate in found.rates:
        before = earlier["rates"].get((rate.kind, rate.name, rate.precision))
        if before is None:
            continue
        now, then = rate.images_per_s, before["images_per_s"]
        if rate.plain_per_s and before.get("plain_per_s"):
            now, then = now / rate.plain_per_s, then / before["plain_per_s"]
        if now < _SLOWER * then:
            lines.append(f"slower than before: {rate.name} {rate.precision}, {now / then:.2f} of it.")
    return lines

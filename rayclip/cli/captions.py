"""`rayclip captions`: generate or read sentences about classes, filter them and save them as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayclip.cli.help import Command, Group
from rayclip.cli.options import Cluster, JsonLogs, Quiet, Verbose, complete_data, complete_models
from rayclip.paths import check_file
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.data import ImageSet
    from rayclip.data.descriptions import Descriptions, Matching, Unmatched

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Choose captions of classes: check and filter a file of descriptions, generate one, show what was chosen.",
    short_help="Choose, check, generate and show captions of classes.",
)

_FEW = 10  # names printed by commands whose purpose is not this report

Source = Annotated[
    str,
    typer.Argument(
        metavar="JSON", help="File or http(s) address: one object, class name to list of sentences (CuPL's form)."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Data set whose classes are meant: a name, a Parquet file, a folder.", autocompletion=complete_data
    ),
]
Classes = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Instead of --data: class names in label order, one per line.")
]


@app.command("filter", cls=Command)
def filter_captions(
    json: Source,
    model: Annotated[
        str,
        typer.Option(
            help="CLIP whose text encoder measures: digits, local-dir:PATH, hf-hub:ORG/NAME or NAME:TAG.",
            autocompletion=complete_models,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Table to write: .parquet, or .csv for a spreadsheet.")],
    data: Data = None,
    classes: Classes = None,
    keep: Annotated[int, typer.Option(min=1, help="Captions per class.")] = 5,
    fill: Annotated[
        Literal["template"] | None,
        typer.Option(help="template: fill classes with too few captions up with class prompts, marked in the table."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a table, edits and all.")] = False,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
) -> None:
    """Keep the captions of each class that are nearest to its name by CLIP's text encoder (SAFT's filter)."""
    from rayclip.data.captions import Caption, check_table_name, write_captions
    from rayclip.data.descriptions import match_classes, read_descriptions
    from rayclip.models.captions import check_enough, nearest_captions

    check_table_name(out)
    check_file("--out", out)
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists and may have been edited: give another name, or --overwrite.")
    names, alternatives = _class_names(data, classes)
    described = read_descriptions(json)
    matching = match_classes(described.sentences, names, alternatives)
    check_enough(names, matching.captions, keep, fill=fill == "template")  # fail before the model loads

    import torch

    from rayclip.models import load_model
    from rayclip.progress import Display, say

    clip = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
    if not quiet:
        _report(described, matching, names, limit=_FEW)
    with Display(quiet=quiet) as display:
        chosen = nearest_captions(
            clip,
            names,
            matching.captions,
            keep,
            fill=fill == "template",
            progress=lambda done, total: display.update("embedding captions", done, total),
        )
    rows = [
        Caption(
            class_index=label,
            class_name=names[label],
            rank=rank,
            caption=row.caption,
            score=row.score,
            source="template" if row.filled else "description",
        )
        for label, own in enumerate(chosen)
        for rank, row in enumerate(own, start=1)
    ]
    made_from = {
        "keep": keep,
        "filter": "cosine of CLIP's text embeddings of caption and class name",
        "model": model,
        "model_fingerprint": clip.fingerprint(),
        "input": described.source,
        "input_sha256": described.sha256,
        "class_names": names,
    }
    write_captions(out, rows, made_from)
    cut = clip.cut_texts([caption for own in matching.captions for caption in own])
    if cut:
        say(
            "warning",
            f"{_count(len(cut), 'caption is', 'captions are')} longer than the {clip.room} tokens that '{model}' "
            "reads, and cut there: what stands beyond counts for nothing.",
        )
    filled = {row.class_index for row in rows if row.source == "template"}
    if filled and not quiet:
        say("note", f"{_count(len(filled), 'class', 'classes')} filled up with templates")
    print(f"captions: {out} ({_count(len(names), 'class', 'classes')}, {keep} each)")


@app.command(cls=Command)
def check(json: Source, data: Data = None, classes: Classes = None) -> None:
    """Report which classes a file of descriptions has captions for, and what does not match; write nothing."""
    from rayclip.data.descriptions import match_classes, read_descriptions

    names, alternatives = _class_names(data, classes)
    described = read_descriptions(json)
    _report(described, match_classes(described.sentences, names, alternatives), names, limit=None)


@app.command(cls=Command)
def generate(
    generator: Annotated[
        str, typer.Option(help="Folder or hub id of a transformers text-generation or image-text model.")
    ],
    out: Annotated[Path, typer.Option(help="JSON to write; an interrupted run goes on from the parts beside it.")],
    data: Data = None,
    classes: Classes = None,
    per_class: Annotated[int, typer.Option(min=1, help="Sentences per class.")] = 20,
    images: Annotated[
        int | None,
        typer.Option(
            min=0, help="Example images per class from --data.  [default: 3 for image-text models, else none]"
        ),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Own questions, one per line, with {} for the class.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampling.")] = 0.99,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Actors.  [default: a GPU each, or a node each without GPUs]")
    ] = None,
    cluster: Cluster = False,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    verbose: Verbose = False,
) -> None:
    """Generate captions of the classes with a language or image-text model, as input of `rayclip captions filter`."""
    if out.suffix != ".json":
        raise UserError(f"--out {out}: generated captions are written as .json.")
    if not out.is_file():
        check_file("--out", out)
    parts = out.with_suffix(".parts")
    if out.exists() and not (parts / "job.json").is_file():
        raise UserError(f"--out {out} exists and was not generated here: give another name.")

    from rayclip.data import open_data
    from rayclip.distributed.captioning import CaptionJob, generate_captions, open_parts
    from rayclip.distributed.connect import ray_cluster
    from rayclip.models.generators import IMAGE_QUESTIONS, QUESTIONS, GeneratorSettings, generator_kind
    from rayclip.progress import Display, say

    kind = generator_kind(generator)
    images = (3 if kind.sees else 0) if images is None else images
    if images and not kind.sees:
        raise UserError(f"--images {images}: generator '{generator}' takes text only.")
    if kind.sees and not kind.chats and not images:
        raise UserError(f"generator '{generator}' captions images: give it some with --data and --images 3.")
    if images and data is None:
        raise UserError(f"generator '{generator}' needs example images: give --data, or --images 0 to do without.")
    names = list(dict.fromkeys(_class_names(data, classes)[0]))
    examples = open_data(data, "train") if images and data is not None else None
    if examples is not None:
        _check_examples(examples)
    job = CaptionJob(
        generator=generator,
        generator_fingerprint=kind.fingerprint,
        class_names=tuple(names),
        per_class=per_class,
        questions=_read_questions(questions) if questions else IMAGE_QUESTIONS if images else QUESTIONS,
        images=images,
        data_fingerprint="" if examples is None else examples.fingerprint,
        seed=seed,
        settings=GeneratorSettings(batch_size=batch_size, temperature=temperature, max_new_tokens=max_new_tokens),
    )
    open_parts(job, parts)
    if out.exists():  # do not overwrite: it may have been edited
        print(f"{out} already holds these captions; nothing to do.")
        return
    display = Display(quiet=quiet)
    with ray_cluster(cluster=cluster, verbose=verbose), display:
        found = generate_captions(job, parts, examples, display=display, workers=workers)
    _write_json(out, found)
    few = [name for name in names if len(found[name]) < per_class]
    if few and not quiet:
        say(
            "note",
            f"{_count(len(few), 'class', 'classes')} with fewer than {per_class} sentences, because answers were "
            f"repeats or unfinished: {_listed([f'{name} ({len(found[name])})' for name in few], _FEW)}",
        )
    print(f"captions: {out} ({sum(map(len, found.values()))} sentences of {_count(len(found), 'class', 'classes')})")
    meant = f"--data {data}" if data else f"--classes {classes}"
    print(f"choose from them: rayclip captions filter {out} {meant} --model MODEL --out {out.with_suffix('.parquet')}")


@app.command(cls=Command)
def show(
    file: Annotated[Path, typer.Argument(help="A table that `rayclip captions filter` wrote, edited or not.")],
    find: Annotated[str, typer.Option("--class", help="Only classes whose name contains this.")] = "",
) -> None:
    """Check and print a table of captions."""
    from rayclip.data.captions import read_captions, read_table

    read_captions(file)
    table = read_table(file)
    origin = table.made_from
    if origin:
        print(f"from {origin.get('input')}, {origin.get('keep')} per class, by {origin.get('model')}")
    shown = [row for row in table.rows if find.lower() in row.class_name.lower()]
    if not shown:
        raise UserError(f"{file} has no class whose name contains '{find}'.")
    label = -1
    for row in shown:
        if row.class_index != label:
            label = row.class_index
            print(f"{label} {row.class_name}".rstrip())
        score = " " * 6 if row.score is None else f"{row.score:.4f}"
        mark = "" if row.source in ("description", "") else f"  [{row.source}]"
        print(f"   {score}  {row.caption}{mark}")


def _class_names(data: str | None, classes: Path | None) -> tuple[list[str], list[str] | None]:
    """Return the class names in label order, and the data set's other spellings, if any."""
    if (data is None) == (classes is None):
        raise UserError("give the classes, either by --data NAME or by --classes FILE.")
    if classes is not None:
        names = _read_lines(classes)
        if not names:
            raise UserError(f"{classes} names no class: write one per line.")
        return names, None
    found = _open_either(str(data))
    raw = getattr(found, "raw_names", None)
    return list(found.class_names), None if raw is None else list(raw)


def _open_either(data: str) -> "ImageSet":
    """Open the test split, or else the train split: both have the class names, and one may not be prepared."""
    from rayclip.data import open_data

    try:
        return open_data(data, "test")
    except UserError as error:
        try:
            return open_data(data, "train")
        except UserError:
            raise error from None


def _check_examples(data: "ImageSet") -> None:
    import numpy as np

    counts = np.bincount(data.labels, minlength=len(data.class_names))
    bare = [name for name, count in zip(data.class_names, counts, strict=True) if not count]
    if bare:
        raise UserError(
            f"'{data.name}' has no training image of {_listed([f'{name!r}' for name in bare], 5)}: every class needs "
            "an example, or use --images 0."
        )


def _read_questions(path: Path) -> tuple[str, ...]:
    questions = _read_lines(path)
    if not questions or not all("{}" in question for question in questions):
        raise UserError(f"{path} must hold questions, one per line, each with {{}} where the class belongs.")
    return tuple(questions)


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.") from None


def _write_json(path: Path, value: dict[str, list[str]]) -> None:
    import json
    import os

    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_text(json.dumps(value, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _report(described: "Descriptions", matching: "Matching", names: Sequence[str], limit: int | None) -> None:
    """Print which classes have captions and what does not match; with a `limit`, as a short note."""
    from rayclip.progress import say

    counts = [len(own) for own in matching.captions if own]
    lines = [f"{len(names) - len(matching.unmatched)} of {_count(len(names), 'class', 'classes')} matched"]
    if counts:
        span = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        lines[0] += f", with {span} captions each"
    dropped = [f"{described.repeated} repeated", f"{described.empty} empty"]
    if described.repeated or described.empty:
        lines.append(f"sentences dropped: {', '.join(d for d in dropped if not d.startswith('0 '))}")
    bare = [names[i] for i, key in enumerate(matching.keys) if key is not None and not matching.captions[i]]
    if bare:
        lines.append(f"matched but without a sentence: {_listed(bare, limit)}")
    for group in matching.conflicts:
        lines.append(f"names that differ in spelling only: {', '.join(group)}")
    lines += _names("classes without captions", list(matching.unmatched.values()), limit)
    lines += _names("descriptions that no class uses", matching.unused, limit)
    text = "\n".join(lines)
    if limit is None:
        print(text)
    else:
        say("note", text)


def _names(title: str, found: "Sequence[Unmatched]", limit: int | None) -> list[str]:
    if not found:
        return []
    lines = [f"{title} ({len(found)}):"]
    for each in found[:limit]:
        notes = [each.reason] if each.reason else [f"nearest: {each.nearest}"] if each.nearest else []
        lines.append(f"  {each.name}" + "".join(f"   ({note})" for note in notes))
    if limit is not None and len(found) > limit:
        lines.append(f"  and {len(found) - limit} more; rayclip captions check lists all")
    return lines


def _listed(names: Sequence[str], limit: int | None) -> str:
    more = f" and {len(names) - limit} more" if limit is not None and len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"

"""`rayclip captions`: generate or read sentences about classes, filter them and save them as a table."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayclip.cli.command import FromZero, Positive, add_command, command_group
from rayclip.cli.options import write_file
from rayclip.paths import check_file
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.data import ImageSet
    from rayclip.data.descriptions import Descriptions, Matching

app = command_group(
    "Choose captions of classes: check and filter a file of descriptions, generate one, show what was chosen.",
    short_help="Choose, check, generate and show captions of classes.",
)

_FEW = 10  # names printed by commands whose purpose is not this report


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes that captions are for.

    Attributes:
        data: Data set whose classes are meant: a name, a Parquet file, a folder.
        classes: Instead of --data: class names in label order, one per line.
    """

    data: str | None = None
    classes: Annotated[Path | None, typer.Option(metavar="FILE")] = None

    def names(self) -> tuple[list[str], list[str] | None]:
        """Return the class names in label order, and the data set's other spellings, if any."""
        if (self.data is None) == (self.classes is None):
            raise UserError("give the classes, either by --data NAME or by --classes FILE.")
        if self.data is not None:
            found = _open_either(self.data)
            raw = getattr(found, "raw_names", None)
            return list(found.class_names), None if raw is None else list(raw)
        assert self.classes is not None
        names = _read_lines(self.classes)
        if not names:
            raise UserError(f"{self.classes} names no class: write one per line.")
        return names, None


@dataclass(frozen=True, kw_only=True)
class Source(Classes):
    """A file of descriptions, and the classes that they are for.

    Attributes:
        json: File or http(s) address: one object, class name to list of sentences (CuPL's form).
    """

    json: Annotated[str, typer.Argument(metavar="JSON")]

    def match(self) -> "tuple[Descriptions, Matching, list[str]]":
        """Return the descriptions, what of them belongs to which class, and the names of the classes."""
        from rayclip.data.descriptions import match_classes, read_descriptions

        names, alternatives = self.names()
        described = read_descriptions(self.json)
        return described, match_classes(described.sentences, names, alternatives), names


def filter_captions(
    source: Source,
    model: str,
    out: Path,
    keep: Positive = 5,
    fill: Literal["template"] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Keep the captions of each class that are nearest to its name by CLIP's text encoder (SAFT's filter).

    Args:
        model: CLIP whose text encoder measures: digits, local-dir:PATH, hf-hub:ORG/NAME or NAME:TAG.
        out: Table to write: .parquet, or .csv for a spreadsheet.
        keep: Captions per class.
        fill: template: fill classes with too few captions up with class prompts, marked in the table.
        overwrite: Replace a table, edits and all.
    """
    from rayclip.data.captions import Caption, check_table_name, write_captions
    from rayclip.models.captions import check_enough, nearest_captions

    check_table_name(out)
    check_file("--out", out)
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists and may have been edited: give another name, or --overwrite.")
    described, matching, names = source.match()
    check_enough(names, matching.captions, keep, fill=fill == "template")  # fail before the model loads

    import torch

    from rayclip.models import load_model
    from rayclip.progress import Display, say

    clip = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
    if not quiet:
        say("note", "\n".join(_report(described, matching, names, limit=_FEW)))
    with Display(quiet=quiet) as display:
        chosen = nearest_captions(
            clip,
            names,
            matching.captions,
            keep,
            fill=fill == "template",
            progress=functools.partial(display.update, "embedding captions"),
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


def check(source: Source) -> None:
    """Report which classes a file of descriptions has captions for, and what does not match; write nothing."""
    described, matching, names = source.match()
    print("\n".join(_report(described, matching, names, limit=None)))


def generate(
    wanted: Classes,
    generator: str,
    out: Path,
    per_class: Positive = 20,
    images: FromZero | None = None,
    questions: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.99,
    max_new_tokens: Annotated[int, typer.Option(min=8)] = 64,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel="Options")] = 64,
    seed: FromZero = 0,
    workers: Positive | None = None,
    cluster: bool = False,
    quiet: bool = False,
    json_logs: bool = False,
    verbose: bool = False,
) -> None:
    """Generate captions of the classes with a language or image-text model, as input of `rayclip captions filter`.

    Args:
        generator: Folder or hub id of a transformers text-generation or image-text model.
        out: JSON to write; an interrupted run goes on from the parts beside it.
        per_class: Sentences per class.
        images: Example images per class from --data. [default: 3 for image-text models, else none]
        questions: Own questions, one per line, with {} for the class.
        temperature: Of sampling.
        max_new_tokens: Longest answer.
        batch_size: Questions at a time.
        workers: Actors. [default: a GPU each, or a node each without GPUs]
    """
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

    kind, data = generator_kind(generator), wanted.data
    images = (3 if kind.sees else 0) if images is None else images
    if images and not kind.sees:
        raise UserError(f"--images {images}: generator '{generator}' takes text only.")
    if kind.sees and not kind.chats and not images:
        raise UserError(f"generator '{generator}' captions images: give it some with --data and --images 3.")
    if images and data is None:
        raise UserError(f"generator '{generator}' needs example images: give --data, or --images 0 to do without.")
    names = list(dict.fromkeys(wanted.names()[0]))
    asked = _read_lines(questions) if questions else IMAGE_QUESTIONS if images else QUESTIONS
    if not asked or not all("{}" in question for question in asked):
        raise UserError(f"{questions} must hold questions, one per line, each with {{}} where the class belongs.")
    examples = open_data(data, "train") if images and data is not None else None
    if examples is not None:
        present = set(examples.labels.tolist())
        bare = [repr(name) for label, name in enumerate(examples.class_names) if label not in present]
        if bare:
            raise UserError(
                f"'{examples.name}' has no training image of {_listed(bare, 5)}: every class needs an example, or use "
                "--images 0."
            )
    job = CaptionJob(
        generator=generator,
        generator_fingerprint=kind.fingerprint,
        class_names=tuple(names),
        per_class=per_class,
        questions=tuple(asked),
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
    write_file(out, json.dumps(found, indent=0, ensure_ascii=False) + "\n")
    few = [name for name in names if len(found[name]) < per_class]
    if few and not quiet:
        say(
            "note",
            f"{_count(len(few), 'class', 'classes')} with fewer than {per_class} sentences, because answers were "
            f"repeats or unfinished: {_listed([f'{name} ({len(found[name])})' for name in few], _FEW)}",
        )
    print(f"captions: {out} ({sum(map(len, found.values()))} sentences of {_count(len(found), 'class', 'classes')})")
    meant = f"--data {data}" if data else f"--classes {wanted.classes}"
    print(f"choose from them: rayclip captions filter {out} {meant} --model MODEL --out {out.with_suffix('.parquet')}")


def show(file: Annotated[Path, typer.Argument()], find: Annotated[str, typer.Option("--class")] = "") -> None:
    """Check and print a table of captions.

    Args:
        file: A table that `rayclip captions filter` wrote, edited or not.
        find: Only classes whose name contains this.
    """
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


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.") from None


def _report(described: "Descriptions", matching: "Matching", names: Sequence[str], limit: int | None) -> Iterator[str]:
    """Yield lines on which classes have captions and what does not match, at most `limit` names of each kind."""
    counts = {len(own) for own in matching.captions if own}
    span = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else "".join(map(str, counts))
    matched = f"{len(names) - len(matching.unmatched)} of {_count(len(names), 'class', 'classes')} matched"
    yield matched + f", with {span} captions each" * bool(counts)
    dropped = {"repeated": described.repeated, "empty": described.empty}
    if any(dropped.values()):
        yield f"sentences dropped: {', '.join(f'{n} {why}' for why, n in dropped.items() if n)}"
    bare = [names[i] for i, key in enumerate(matching.keys) if key is not None and not matching.captions[i]]
    if bare:
        yield f"matched but without a sentence: {_listed(bare, limit)}"
    for group in matching.conflicts:
        yield f"names that differ in spelling only: {', '.join(group)}"
    for title, found in (
        ("classes without captions", [*matching.unmatched.values()]),
        ("descriptions that no class uses", [*matching.unused]),
    ):
        if found:
            yield f"{title} ({len(found)}):"
        for each in found[:limit]:
            note = each.reason or (f"nearest: {each.nearest}" if each.nearest else "")
            yield f"  {each.name}" + f"   ({note})" * bool(note)
        if limit is not None and len(found) > limit:
            yield f"  and {len(found) - limit} more; rayclip captions check lists all"


def _listed(names: Sequence[str], limit: int | None) -> str:
    more = f" and {len(names) - limit} more" if limit is not None and len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


add_command(app, "filter", filter_captions)
for command in (check, generate, show):
    add_command(app, command.__name__, command)

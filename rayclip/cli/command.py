"""Make commands of functions, and their help pages.

A parameter of the function is an option, which its docstring describes under `Args:`, unless it is one of those that
several commands have (`SHARED`). A parameter whose type is a dataclass stands for an option per field, described under
its `Attributes:`. Help pages are plain text without markup: it starts fast, can be searched, and prints brackets as
they are; options stand in groups, as wide as the terminal, summaries whole.
"""

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from rayclip.names import ATTACKS_ABOUT, DATASETS, DEFENSES_ABOUT, METHODS

Positive = Annotated[int, typer.Option(min=1)]
FromZero = Annotated[int, typer.Option(min=0)]
MODELS = (
    "digits (bundled), local-dir:PATH (layout of open_clip or transformers), hf:ORG/NAME (transformers), "
    "hf-hub:ORG/NAME (open_clip), an open_clip NAME:TAG such as ViT-B-32:openai, zoo:NAME (a published robust CLIP: "
    "rayclip models list), NAME-quickgelu:FILE or NAME-gelu:FILE with a file of weights, or prompted:PATH (what advpt, "
    "apt, fap and vp learn)."
)
WIDTH = {"max_content_width": 160}

_GROUPS = {
    "Model and data": "method methods model origin target a protocol data test shots limit subset captions resolution "
    "resize class_names template seed seeds",
    "Search": "search samples by reduction",
    "Attack": "attacks test_eps attack eps steps step_size norm start eps_warmup substitutes precision compiled",
    "Defence and scoring": "defense aim draws judgements scorer made_against",
    "Optimiser": "epochs recipe lr batch_size accumulate optimizer momentum betas weight_decay schedule warmup_steps "
    "ema trains validate",
    "Cluster": "gpus_per_worker shard_size data_workers workers min_workers cluster local",
    "Tracking": "tracking_uri no_tracking experiment",
    "Output": "out models json save_adversarial save_every_steps quiet json_logs verbose help",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}
_ORDER = list(_GROUP_OF)
SHARED = {
    "model": f"Repeat for several, or commas between. {MODELS}",
    "eps": "Budgets in pixel units, as fractions, commas between: 1/255,2/255. Every attack that names none of its own "
    "(pgd-l2:eps=128/255) is run at each.",
    "steps": "Steps of attacks that name none.",
    "step_size": "Length of an attack step.  [default: 1/255, or 2.5·eps/steps in l_2 and where steps of 1/255 do not "
    "cross the ball]",
    "substitutes": "Source of replacement words: clip-table, or a masked language model's hub name or folder.  "
    "[default: clip-table for digits, else bert-base-uncased]",
    "seed": "Seed of all random numbers.",
    "resolution": "Perturb images at their own size (native), or resize them to the model's input first (model).",
    "resize": "Resize native images to the model's input as PIL does (antialias), or as the code of TeCoA and MMCoA "
    "does (plain: bicubic without anti-aliasing).",
    "class_names": "Spell the classes as CLIP does (curated), or as the data set itself and the papers' code (raw); or "
    "a FILE of names, one per line in label order or a JSON list, for data that carry none.",
    "cluster": "Use the running Ray cluster (RAY_ADDRESS or this node's).",
    "min_workers": "Continue with this many workers while the cluster has no room for all.  [default: wait for all]",
    "tracking_uri": "MLflow store or server.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here]",
    "no_tracking": "Log nothing to MLflow now; rayclip log can later.",
    "experiment": "MLflow experiment.",
    "root": "Folder or object-store URI of the prepared data sets.  [default: RAYCLIP_DATA, or ~/.cache/rayclip/data]",
    "out": "Folder or URI of the results; what is there is not computed again.",
    "json": "Also write the rows to FILE; - is standard output.",
    "quiet": "Show no progress.",
    "json_logs": "Progress, notes and errors as JSON objects, one per line, on standard error.",
    "verbose": "Also print the output of Ray and its workers.",
}


def complete(known: Collection[str], group: str = "") -> Callable[[str], list[str]]:
    """Return a shell completion for names, also in lists and chains, including those of an entry-point group."""

    def complete_names(incomplete: str) -> list[str]:
        from importlib.metadata import entry_points

        before = "".join(re.findall(r"^.*[,+]", incomplete))
        return [before + name for name in (*known, *(e.name for e in entry_points(group=f"rayclip.{group}")))]

    return complete_names


_COMPLETIONS = {
    **dict.fromkeys(("model", "origin", "target", "add"), complete(["digits"])),
    "data": complete(DATASETS, "datasets"),
    "attacks": complete(ATTACKS_ABOUT, "attacks"),
    "defense": complete(["none", *DEFENSES_ABOUT], "defenses"),
    **dict.fromkeys(("method", "methods"), complete(METHODS, "methods")),
}


def read_docstring(text: str | None) -> tuple[str, dict[str, str]]:
    """Return a docstring without its sections, and what these say of each argument or attribute."""
    body, *sections = re.split(r"\n *(?:Attributes|Args|Raises):\n", inspect.cleandoc(text or ""))
    found = re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {5,}.+)*)", "\n".join(sections), flags=re.M)
    return body.strip(), {name: " ".join(said.split()) for names, said in found for name in names.split(", ")}


def with_options(function: Callable[..., None], *, omit: Collection[str] = (), **defaults: Any) -> Callable[..., None]:
    """Return a function for Typer with an option for each parameter of `function`, and for each field of those that
    are dataclasses.

    Args:
        omit: options that it does not have after all; their fields keep their defaults.
        defaults: of options, where they differ from those that are written.
    """
    body, described = read_docstring(function.__doc__)
    groups: dict[str, type] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        members = [parameter]
        if isinstance(kind := parameter.annotation, type) and dataclasses.is_dataclass(kind):
            groups[parameter.name] = kind
            members = list(inspect.signature(kind).parameters.values())
            for base in kind.__mro__:
                described = read_docstring(base.__doc__)[1] | described
        options += [p.replace(default=defaults.get(p.name, p.default)) for p in members if p.name not in omit]

    def run(**values: Any) -> None:
        values |= {name: () for name in several if not values[name]}
        made = {}
        for name, kind in groups.items():
            known = inspect.signature(kind).parameters
            own = {key: values.pop(key) for key in known if key in values}
            made[name] = kind(**{key: value for key, value in defaults.items() if key in known} | own)
        function(**made, **values)

    shown = [_for_typer(option, described) for option in options]
    several = [p.name for p in shown if get_args(p.annotation)[0] == list[str]]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__name__, run.__doc__, run.__module__ = function.__name__, body, function.__module__
    return run


def _for_typer(option: inspect.Parameter, described: Mapping[str, str]) -> inspect.Parameter:
    """Return a parameter with everything that Typer shows of it."""
    name, kind, default, info = option.name, option.annotation, option.default, typer.Option()
    for part in (kind, *get_args(kind)):  # `Positive` or `Positive | None`
        if get_origin(part) is Annotated:
            inner, info = get_args(part)
            kind = inner if part is kind else inner | None
    info = copy.copy(info)
    if get_origin(kind) is Sequence:
        kind, default = list[str], list(default) or None if isinstance(default, Sequence) else default
        info.metavar = info.metavar or name.upper().replace("_", "-")
    if kind is bool and default is False and info.default is ...:
        info.param_decls = (f"--{name.replace('_', '-')}",)
    info.help = info.help or described.get(name) or SHARED.get(name) or ""
    if "[default: " in info.help:
        info.help, info.show_default = re.sub(r" +(?=\[default: )", "  ", info.help), False
    info.autocompletion = info.autocompletion or _COMPLETIONS.get(name)
    return option.replace(annotation=Annotated[kind, info], default=default, kind=inspect.Parameter.KEYWORD_ONLY)


def command_group(about: str, **settings: Any) -> typer.Typer:
    """Return a Typer application whose help says this about it; `add_command` adds to it."""
    return typer.Typer(
        cls=CommandGroup,
        context_settings=WIDTH,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help=about,
        **settings,
    )


def add_command(app: typer.Typer, name: str, function: Callable[..., None], **options: Any) -> None:
    """Add a command to an application; `options` are those of `with_options`."""
    app.command(name, cls=Command)(with_options(function, **options))


class Command(TyperCommand):
    """A command whose options are listed by group; those that only it has come first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in ("Arguments", "Options", *_GROUPS)}
        for param in sorted(self.get_params(ctx), key=lambda p: _ORDER.index(p.name) if p.name in _ORDER else 0):
            record = param.get_help_record(ctx)
            if record is not None:
                group = getattr(param, "rich_help_panel", None) or _GROUP_OF.get(param.name or "", "Options")
                groups["Arguments" if param.param_type_name == "argument" else group].append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


class CommandGroup(TyperGroup):
    """A group of commands, each with its whole summary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, command) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        shown = [(name, command.get_short_help_str(1000)) for name, command in commands if not command.hidden]
        if shown:
            with formatter.section("Commands"):
                formatter.write_dl(shown)

"""Shared by the files in `sweeps/`: options, running and the result table. Each file adds only its own question."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer

from rayclip.cli.command import WIDTH, Command, with_options
from rayclip.cli.options import split
from rayclip.cli.running import run as run_app
from rayclip.cli.scales import MMCOA_METHODS, Options, ScaleName
from rayclip.cli.sweep_run import Run, spell

__all__ = ["Run", "spell", "split", "start", "sweep"]


def sweep(
    name: str,
    *,
    every: Mapping[str, Any] | None = None,
    paper: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    small: Mapping[str, Any] | None = None,
    omit: Iterable[str] = (),
    methods: str = MMCOA_METHODS,
    **defaults: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate `question(run, *, its own options)` into a command that also has the options common to all sweeps.

    Args:
        name: of the experiment; `mmcoa-shots` is the file `mmcoa_shots.py`.
        every, paper, small: `Scale` fields to change at every scale, at `paper` (or a function that returns them), and
            at the two smaller ones.
        omit: common options that do not apply.
        methods: default of `--methods`.
        defaults: of other options, where they differ from those of `Options`.
    """

    def wrap(question: Callable[..., None]) -> Callable[..., None]:
        def command(options: Options, **own: Any) -> None:
            differs = (paper() if callable(paper) else paper) if options.scale == ScaleName.paper else small
            about = inspect.getdoc(inspect.getmodule(question)) or ""
            run = Run(name, options, {**(every or {}), **(differs or {})}, about)
            question(run, **own)
            run.end()

        options, *_ = inspect.signature(command).parameters.values()
        _, *own = inspect.signature(question).parameters.values()
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, options)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__, command.__name__ = question.__doc__, name.replace("-", "_")
        command.__module__ = question.__module__
        return with_options(command, omit=set(omit), methods=[methods], **defaults)

    return wrap


def start(command: Callable[..., None]) -> None:
    """Run a sweep's file as a program."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    about = inspect.getdoc(inspect.getmodule(command)) or ""
    app.command(cls=Command, context_settings=WIDTH, epilog=re.sub("(^|\n\n)", r"\1\b\n", about))(command)
    run_app(app, f"{command.__name__}.py")

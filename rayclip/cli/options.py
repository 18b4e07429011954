"""Values of options that several commands have: split them, and check them before any work starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayclip.paths import check_folder, check_stream, split_places
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.api import Tracking


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Where a command logs to MLflow. Refused at once: an address at which MLflow can never be."""

    tracking_uri: str | None = None
    no_tracking: bool = False
    experiment: str = ""

    def __post_init__(self) -> None:
        if not self.no_tracking:
            check_tracking(self.tracking_uri)

    @property
    def tracking(self) -> "Tracking | None":
        from rayclip.api import Tracking

        return None if self.no_tracking else Tracking.choose(self.tracking_uri, self.experiment)


def split(values: Sequence[str]) -> tuple[str, ...]:
    """Split the values of a repeatable option at commas."""
    return tuple(part.strip() for part in ",".join(values).split(",") if part.strip())


def split_models(values: Sequence[str]) -> list[str]:
    """Split models at commas, but not the name of an existing folder that contains a comma."""

    def exists(path: Path) -> bool:
        kind, colon, place = str(path).partition(":")
        return Path(place).exists() if colon and "," not in kind else path.exists()

    return split_places(values, exists)


def refuse_repeats(command: Any, arguments: Sequence[str]) -> None:
    """Raise a `UserError` if an option that takes one value is given twice: click would silently use the last one.

    `command` is click's (`typer.main.get_command`), or a group, in which the arguments name the command.
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
        if option is None or option.is_flag:
            continue
        if option.name in seen and not option.multiple:
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
            hint = f" (or did you mean local-dir:{spec}?)" if Path(spec).expanduser().is_dir() else ""
            raise UserError(
                f"unknown model '{spec}'{hint}: use digits, local-dir:PATH, hf-hub:ORG/NAME or an open_clip NAME:TAG "
                "such as ViT-B-32:openai."
            )
        if kind == "zoo":
            from rayclip.models.zoo import check_available

            check_available(spec)
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


def check_tracking(uri: str | None) -> None:
    """Raise a `UserError` if MLflow can never log to this address; whether it answers is checked later."""
    from rayclip.tracking.address import check_address, default_uri

    check_address(uri or default_uri())


def hand_out(json: str | None, rows: str, show: Callable[[], None]) -> None:
    """Write rows to the `--json` file and show them; `-` writes them to standard output and shows nothing else.

    Raises:
        UserError: the file cannot be written; the rows are shown before.
    """
    if json == "-":
        print(rows, end="")
        return
    failed = None
    if json is not None:
        try:
            write_file(Path(json).expanduser(), rows)
        except OSError as error:
            failed = error
    show()
    if failed is not None:
        raise UserError(
            f"--json {json} cannot be written ({failed.strerror or failed}): make room or mend the rights, and run "
            "again; what is finished is not computed again."
        )


def write_file(path: Path, text: str) -> None:
    """Write a file atomically, or a device or pipe in place."""
    from rayclip.store import Store

    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        path = path.resolve()
        Store(str(path.parent)).write(path.name, text.encode())


def print_table(rows: Sequence[Sequence[str | int]], header: Sequence[str] = ()) -> None:
    """Print rows as wide as the terminal: whole numbers at the right, the last column folded."""
    from rich.table import Table

    from rayclip.terminal import console

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(header))
    for i, column in enumerate(zip(*rows, strict=True)):
        table.add_column(
            header[i] if header else "",
            justify="right" if any(isinstance(value, int) for value in column) else "left",
            style="bold" if i == 0 and not header else "",
            no_wrap=i < len(rows[0]) - 1,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)


def print_grid(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table of results, 120 characters wide where there is no terminal: cells of a grid, texts, whole numbers,
    and others with three digits."""
    from rayclip.reports.grid import Cell, Grid, number_cell
    from rayclip.reports.to_terminal import show

    def cell(value: Cell | str | float) -> Cell:
        if isinstance(value, Cell):
            return value
        return Cell(text=value) if isinstance(value, str) else number_cell(value, ".3g" * isinstance(value, float))

    grid = Grid(title="", header=tuple(header), rows=[(name, [*map(cell, row)]) for name, *row in rows])
    show([grid], width=120)

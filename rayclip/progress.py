"""Progress of several pieces of work at once: bars on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 15.0  # between two lines of one task where there is no terminal


class Display:
    """Use as a context manager; `update` creates a task the first time it is named. Writes to standard error."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lines = _Lines(self._console)

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, name: str, completed: int, total: int, note: str = "") -> None:
        """`completed` of `total` of the task `name` are done; a total of 0 is not known yet."""
        if not self._console.is_terminal:
            self._lines.update(name, completed, total, note)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total or None, note=note)
        self._bars.update(self._tasks[name], completed=completed, total=total or None, note=note)


class _Lines:
    """One task's lines come at most every few seconds, and one when it is done."""

    def __init__(self, console: Console) -> None:
        self._console, self._began = console, time.monotonic()
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def update(self, name: str, completed: int, total: int, note: str) -> None:
        now, done = time.monotonic(), 0 < total <= completed
        if not total or self._last.get(name) == float("inf"):
            return
        began, before = self._first.setdefault(name, (now, completed))
        if not done and now - self._last.get(name, 0.0) < _LINE_EVERY_S:
            return
        self._last[name] = float("inf") if done else now
        left = (total - completed) * (now - began) / (completed - before) if completed > before else 0.0
        remaining = f"  {left:.0f} s left" if left else ""
        line = f"[{now - self._began:4.0f} s] {name:<22} {completed}/{total}  {note}{remaining}"
        self._console.print(line.rstrip(), markup=False)

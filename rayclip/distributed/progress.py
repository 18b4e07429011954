"""Progress of several pieces of work at once: bars on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 15.0  # between two lines of one task where there is no terminal


class Display:
    """Use as a context manager; `update` creates a task the first time it is named."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._began = time.monotonic()

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    def update(self, name: str, completed: int, total: int, note: str = "") -> None:
        if self.console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note=note)
            self._bars.update(self._tasks[name], completed=completed, total=total, note=note)
            return
        now, done = time.monotonic(), completed >= total
        if done or now - self._last_line.get(name, 0.0) >= _LINE_EVERY_S:
            self._last_line[name] = float("inf") if done else now
            if not done or self._tasks.get(name) is None:
                self.console.print(
                    f"[{now - self._began:4.0f} s] {name:<22} {completed}/{total}  {note}".rstrip(), markup=False
                )
            if done:
                self._tasks[name] = TaskID(0)  # its last line is out

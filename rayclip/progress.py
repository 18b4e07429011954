"""Progress, notes, warnings and errors of a running command, all on standard error.

Progress is shown as bars on a terminal, one for each task, and elsewhere as an occasional line. After `log_as_json`
all output is JSON, one object per line. The bars are rich's; its `rich.progress` was tried: it has no rate when 30 s
pass without a step, and never counts the first step, while ours come in shards of minutes and with a cost of their own.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rayclip import terminal

Level = Literal["note", "warning", "error"]

_LINE_EVERY_S = 15.0  # seconds between two lines of one task, without a terminal
_JSON_EVERY_S = 1.0  # seconds between two JSON objects of one task
_ALL = 12  # up to this many tasks are all shown; of more, only those running
_AT_WORK = 8  # most bars shown for parts, or for running tasks
_BAR = 10  # width of a bar in columns, of 80
_NAME = 24  # most characters to which names are padded where notes follow them

# Variables that libraries read at import, for those whose output Python's logging does not control
_SILENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}

_as_json = False  # for the whole process, set once by the command line


def log_as_json() -> None:
    """Write only JSON objects to standard error from now on, one per line.

    Each has `time` (ISO 8601, UTC) and `level`: `progress` with `task`, `completed`, `total`, `per_second`,
    `seconds_left` and `note`, the others (`note`, `warning`, `error`) with `message`. Warnings of libraries are
    included, and so are unexpected errors, with their `traceback`.
    """
    global _as_json
    _as_json = True
    os.environ |= _SILENT
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_JsonHandler()], level=logging.WARNING, force=True)
    sys.excepthook = _write_traceback


_listeners: list[list[tuple[Level, str]]] = []


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[Level, str]]]:
    """Collect the messages said in this block, so that they can be repeated later."""
    heard: list[tuple[Level, str]] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.remove(heard)


def say(level: Level, message: str) -> None:
    """Write one sentence (or several lines) to standard error."""
    for heard in _listeners:
        heard.append((level, message))
    if _as_json:
        _write(level, message=message)
    else:
        with contextlib.suppress(OSError):  # closed by its reader, or disk full: no reason to end the work
            print(f"{level}: {message}", file=sys.stderr)


def _write(level: str, **fields: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    with contextlib.suppress(OSError):
        print(json.dumps({"time": now, "level": level, **fields}), file=sys.stderr, flush=True)


def _write_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _write("error", message=f"{kind.__name__}: {error}", traceback="".join(traceback.format_exception(error)))


class _JsonHandler(logging.Handler):
    """Writes the log records of libraries as JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        _write(level, message=record.getMessage().strip(), logger=record.name)


@dataclass
class _Task:
    """Progress of one task: `completed` of `total` are done; a total of 0 means unknown yet."""

    name: str
    completed: int = 0
    total: int = 0
    note: str = ""
    began: float = 0.0
    before: int = 0
    at: float = 0.0
    told: float = -math.inf
    known_left: float | None = None  # seconds, from who knows better than the rate

    def update(self, completed: int, total: int, note: str, left: float | None = None) -> None:
        self.at = time.monotonic()
        if (
            not self.begun or completed <= self.before
        ):  # exclude waiting time and work of an earlier run from this run's rate
            self.began, self.before = self.at, completed
        self.completed, self.total, self.note, self.known_left = completed, total, note, left

    @property
    def done(self) -> bool:
        return 0 < self.total <= self.completed

    @property
    def begun(self) -> bool:
        return self.completed + self.total > 0

    @property
    def rate(self) -> float | None:
        """Items per second in this run; None while unknown."""
        elapsed = self.at - self.began
        return (self.completed - self.before) / elapsed if elapsed > 0 and self.completed > self.before else None

    @property
    def left(self) -> float | None:
        """Seconds left, at that rate unless it is known; None while unknown, and once done."""
        if self.known_left is not None and not self.done:
            return self.known_left
        return (self.total - self.completed) / self.rate if self.rate and self.total and not self.done else None


class Display:
    """Progress display; use as a context manager. `update` creates a task when it is first named."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._tasks: dict[str, _Task] = {}
        self._parts: dict[str, _Task] = {}
        self._began = time.monotonic()
        self._quiet = quiet
        self._console = terminal.console(stderr=True)
        bars = self._console.is_terminal and not quiet and not _as_json
        self._live = Live(console=self._console, get_renderable=self._picture) if bars else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.clear()
        if self._live:
            self._live.stop()

    def update(self, name: str, completed: int, total: int, note: str = "", left: float | None = None) -> None:
        """Report that `completed` of `total` of the task `name` are done; a total of 0 means unknown yet.

        Args:
            left: seconds left, if they are known better than from the rate.
        """
        task = self._tasks.setdefault(name, _Task(name))
        task.update(completed, total, note, left)
        if not self._live and not self._quiet:
            self._tell(task)

    def part(self, key: str, name: str, total: int, more: int = 0) -> None:
        """Report that a part of the work has begun, or that `more` of its `total` are done. A terminal shows the part
        below the tasks until it is finished.

        Args:
            key: distinguishes parts of the same name.
        """
        part = self._parts.setdefault(key, _Task(name))
        part.update(part.completed + more, total, "")
        if part.done:
            del self._parts[key]

    def _tell(self, task: _Task) -> None:
        """Write a line or a JSON object at intervals, and one when the task is done."""
        now = time.monotonic()
        wait = _JSON_EVERY_S if _as_json else _LINE_EVERY_S
        if not task.begun or task.told == math.inf or (not task.done and now - task.told < wait):
            return
        task.told = math.inf if task.done else now
        rate, left = task.rate, task.left
        if _as_json:
            _write(
                "progress",
                task=task.name,
                completed=task.completed,
                total=task.total or None,
                per_second=rate and round(rate, 3),
                seconds_left=0.0 if task.done else left and round(left, 1),
                note=task.note,
            )
            return
        parts = (f"{task.name:<22} {_count(task)}", _pace(rate), f"{_clock(left)} left" * bool(left), task.note)
        line = "  ".join(part for part in parts if part)
        with contextlib.suppress(OSError):
            self._console.print(f"[{now - self._began:4.0f} s] {line}", soft_wrap=True)

    def _picture(self) -> Table:
        """Draw the bars, each with its name, count, rate and time left."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column()
        for justify in ("left", "right", "right", "right"):
            grid.add_column(justify=justify, no_wrap=True)
        tasks, parts = list(self._tasks.values()), list(self._parts.values())
        at_work = tasks if len(tasks) <= _ALL else [t for t in tasks if t.begun and not t.done][:_AT_WORK]
        width = min(_NAME, max((len(task.name) for task in at_work), default=0))
        for task in at_work:
            _add_row(grid, f"{task.name:<{width}}  {task.note}" if task.note else task.name, task)
        if len(at_work) < len(tasks):
            done = sum(task.done for task in tasks)
            grid.add_row(_cut(f"and {len(tasks) - len(at_work)} more; {done} of {len(tasks)} are done"))
        for part in parts[:_AT_WORK]:
            _add_row(grid, f"  {part.name}", part)
        if len(parts) > _AT_WORK:
            grid.add_row(_cut(f"  and {len(parts) - _AT_WORK} more cells"))
        return grid


def _add_row(grid: Table, text: str, task: _Task) -> None:
    bar = ProgressBar(total=task.total or (None if task.begun else 1), completed=task.completed, width=_BAR)
    grid.add_row(_cut(text), bar, _count(task), _pace(task.rate), _clock(task.left))


def _count(task: _Task) -> str:
    return f"{task.completed}/{task.total or '?'}" if task.begun else ""


def _cut(text: str) -> Text:
    """Return text that is shortened with an ellipsis where a row is too long."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _pace(rate: float | None) -> str:
    """Format a rate: `0.25/s`, `12.3/s`, `1234/s`."""
    if rate is None:
        return ""
    return f"{rate:.2g}/s" if rate < 1 else f"{rate:.1f}/s" if rate < 100 else f"{rate:.0f}/s"


def _clock(seconds: float | None) -> str:
    """Format a duration: `0:07`, `12:34`, `1:02:03`."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Progress on stderr: a bar where a person watches, a line now and then where a log does."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from moejax.core import processes

T = TypeVar("T")
QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0


def progress(
    work: Iterable[T] | int | None,
    what: str,
    unit: str = "steps",
    *,
    quiet_seconds: float = QUIET_SECONDS,
    line_seconds: float = LINE_SECONDS,
    console: Console | None = None,
) -> Progress[T]:
    """Progress over `work`: an iterable, a total, or None where the end is unknown.

    for batch in progress(batches, "calibrate", "batches"): ...
    with progress(500, "train", "steps") as bar: bar.advance(1, loss=2.31)

    Nothing shows for work of less than `quiet_seconds`; at 0 it shows at once. Without a terminal a
    plain line comes every `line_seconds`. Of several processes only the first shows anything.
    """
    if not processes.is_first():
        quiet_seconds = threading.TIMEOUT_MAX
    return Progress(work, what, unit, quiet_seconds, line_seconds, console or Console(stderr=True))


class Progress(Generic[T]):
    """One piece of work; bars of nested pieces share the display."""

    def __init__(
        self,
        work: Iterable[T] | int | None,
        what: str,
        unit: str,
        quiet_seconds: float,
        line_seconds: float,
        console: Console,
    ):
        self._items: Iterable[T] = work if isinstance(work, Iterable) else ()
        self.total = (
            work if isinstance(work, int) else len(work) if isinstance(work, Sized) else None
        )
        self.what, self.unit = what, unit
        self.done = 0
        self.facts: dict[str, Any] = {}
        self._quiet, self._every, self._console = quiet_seconds, line_seconds, console
        self._shown = False
        self._task: TaskID | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Progress[T]:
        self._start = time.monotonic()
        self._said = self._start
        # A timer, because the first step may compile for a minute before anything advances.
        self._timer = threading.Timer(self._quiet, self._show)
        self._timer.daemon = True
        if self._quiet > 0:
            self._timer.start()
        else:
            self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._task is not None:
                _DISPLAY.remove(self._task)
            elif self._shown:
                self._say()
            self._shown = True  # a timer that fires late finds nothing left to show

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Counts `n` more, and shows the facts (name=value) beside the count."""
        with self._lock:
            self.done += n
            self.facts.update(facts)
            if self._task is not None:
                _DISPLAY.update(self._task, self.done, self._facts_text())
            elif self._shown and time.monotonic() - self._said >= self._every:
                self._say()

    def line(self) -> str:
        """The state as one line of text."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / elapsed
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        parts = [f"{self.what}: {count} {self.unit} in {duration(elapsed)}"]
        if self.done:
            parts.append(f"{rate:.3g} {self.unit}/s")
        if self.done and self.total and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self._facts_text()] if self.facts else parts)

    def _facts_text(self) -> str:
        return ", ".join(f"{name} {_short(value)}" for name, value in self.facts.items())

    def _show(self) -> None:
        with self._lock:
            if self._shown:
                return
            self._shown = True
            if self._console.is_terminal:
                self._task = _DISPLAY.add(
                    self._console, self.what, self.total, self.done, self._facts_text()
                )
            else:
                self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        print(self.line(), file=self._console.file or sys.stderr, flush=True)


class _Display:
    """The bars of the process: rich allows one live display at a time, so all pieces share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: Bars | None = None

    def add(self, console: Console, what: str, total: int | None, done: int, facts: str) -> TaskID:
        with self._lock:
            bars = self._bars
            if bars is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=30),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[facts]}"),
                )
                self._bars = bars = Bars(*columns, console=console, transient=True)
                bars.start()
            return bars.add_task(what, total=total, completed=done, facts=facts)

    def update(self, task: TaskID, done: int, facts: str) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.update(task, completed=done, facts=facts)

    def remove(self, task: TaskID) -> None:
        with self._lock:
            if self._bars is None:
                return
            self._bars.remove_task(task)
            if not self._bars.task_ids:
                self._bars.stop()
                self._bars = None


_DISPLAY = _Display()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _short(value: Any) -> str:
    return f"{float(value):.4g}" if hasattr(value, "__float__") else str(value)

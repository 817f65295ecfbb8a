"""Progress: quiet when quick, lines for logs, shared bars for people."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from moejax.runs import Progress, duration, progress
from moejax.runs.progress import _DISPLAY


class Heard(io.StringIO):
    """A log that tells when something is written to it."""

    def __init__(self):
        super().__init__()
        self.event = threading.Event()

    def write(self, text):
        self.event.set()
        return super().write(text)


def log() -> tuple[Console, Heard]:
    heard = Heard()
    return Console(file=heard, force_terminal=False), heard


def test_quick_work_shows_nothing():
    """Catches a bar that flashes for every small loop."""
    console, heard = log()
    assert list(progress(range(3), "work", console=console)) == [0, 1, 2]
    assert heard.getvalue() == ""


def test_work_that_does_not_advance_shows_after_its_quiet_time():
    """Catches a display that waits for the first step, which may compile for a minute."""
    console, heard = log()
    with progress(5, "compile", "steps", quiet_seconds=0.01, console=console):
        assert heard.event.wait(20)
    assert heard.getvalue().startswith("compile: 0/5 steps")


def test_a_log_gets_lines_with_count_rate_and_facts():
    """Catches control characters in a log, and facts that are dropped."""
    console, heard = log()
    with progress(4, "train", quiet_seconds=0, line_seconds=0, console=console) as bar:
        bar.advance(1, loss=2.34567)
        bar.advance(3)
    lines = heard.getvalue().splitlines()
    assert "train: 1/4 steps" in lines[1] and "loss 2.346" in lines[1] and "left" in lines[1]
    assert "4/4" in lines[-1] and "left" not in lines[-1]
    assert "\x1b" not in heard.getvalue()


def test_lines_keep_their_distance():
    """Catches a line per step in a log of a million steps."""
    console, heard = log()
    for _ in progress(range(500), "train", quiet_seconds=0, line_seconds=1e6, console=console):
        pass
    assert len(heard.getvalue().splitlines()) == 2  # at the start and at the end


def test_an_unknown_end_is_no_error():
    """Catches a division by an unknown total."""
    console, heard = log()
    stream = (i for i in range(3))
    for _ in progress(stream, "read", "lines", quiet_seconds=0, console=console):
        pass
    assert "read: 3 lines" in heard.getvalue()


def test_nested_bars_share_one_display():
    """Catches the error of rich for a second live display, and a display that is never stopped."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    for _ in progress(range(2), "layers", quiet_seconds=0, console=console):
        for _ in progress(range(2), "experts", quiet_seconds=0, console=console):
            pass
    assert "layers" in out.getvalue() and "experts" in out.getvalue()
    assert _DISPLAY._bars is None


def test_an_error_stops_the_display():
    """Catches a terminal left without cursor after a failure."""
    console = Console(file=io.StringIO(), force_terminal=True)
    with (
        pytest.raises(ZeroDivisionError),
        progress(2, "x", quiet_seconds=0, console=console),
    ):
        _ = 1 // 0
    with progress(1, "y", quiet_seconds=0, console=console) as bar:
        bar.advance()
    assert isinstance(bar, Progress) and bar.done == 1


def test_durations_read_as_people_say_them():
    """Catches seconds by the thousand."""
    assert [duration(s) for s in (0.4, 75, 600, 5400, 9000)] == [
        "0 s",
        "75 s",
        "10 min",
        "90 min",
        "2 h 30 min",
    ]

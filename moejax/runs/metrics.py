"""Metrics of a run as JSON lines: written as they come, readable after a crash, cut on resume.

Any name may be written. Reports draw those below; a name may have parts after a slash, one line
each: `bits_per_byte/docs`, `load_entropy/layer_3`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from moejax.core.atomic import atomic_file
from moejax.core.errors import RunError
from moejax.runs.folder import RunFolder
from moejax.runs.records import plain_floats, to_record
from moejax.runs.trackers import Tracker

TOKENS = "tokens"  # trained on so far, the x axis
LOSS = "loss"  # nats per token, of the batch
LEARNING_RATE = "learning_rate"
TOKENS_PER_SECOND = "tokens_per_second"
BITS_PER_BYTE = "bits_per_byte"  # of held-out text, a part per group
LOAD_MAX = "load_max_over_mean"  # assignments of the busiest expert over the mean of all
LOAD_ENTROPY = "load_entropy"  # of the experts' shares, over log E: 1 is balanced


class Metrics:
    """Appends a line per `write` to metrics.jsonl and passes its finite numbers on to the trackers.

    A line torn by a crash is cut off when the file is opened again.
    """

    def __init__(self, folder: RunFolder | Path | str, trackers: Sequence[Tracker] = ()):
        self.path = (
            folder.metrics_path if isinstance(folder, RunFolder) else Path(folder) / "metrics.jsonl"
        )
        self.trackers = tuple(trackers)
        self._file = self._open()

    def write(self, step: int, **values: Any) -> None:
        """Appends one line: numbers, text, or lists of numbers; nan and inf become strings.

        Raises RunError when the disk is full; every line before stays readable.
        """
        row = {"step": int(step), **to_record(values)}
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        numbers = {key: value for key, value in row.items() if key != "step" and _is_number(value)}
        for tracker in self.trackers:
            tracker.write(int(step), numbers)

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps: a resumed run writes them again."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._file.close()
        with atomic_file(self.path) as file:
            for row in kept:
                file.write(json.dumps(to_record(row), allow_nan=False).encode() + b"\n")
        self._file = self._open()

    def close(self) -> None:
        """Closes the file and the trackers."""
        with suppress(OSError):  # every line was flushed when it was written, or its error raised
            self._file.close()
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        try:
            if self.path.exists():
                whole = _whole_lines(self.path.read_bytes())
                if len(whole) != self.path.stat().st_size:
                    os.truncate(self.path, len(whole))
            return self.path.open("ab")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} cannot be written: {error.strerror or error}.",
            "Free space, then run the same command again: it resumes.",
        )


class NoMetrics(Metrics):
    """Takes the lines of a process that leaves the writing to another one, and forgets them."""

    def __init__(self) -> None:
        self.trackers = ()

    def write(self, step: int, **values: Any) -> None:
        """Forgets."""

    def truncate_after(self, step: int) -> None:
        """Has nothing to drop."""

    def close(self) -> None:
        """Has nothing to close."""


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn last line is left out, nan and inf are floats.

    A missing file has no rows. Raises RunError for a damaged line in the middle.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(_whole_lines(path.read_bytes()).splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**plain_floats(row), "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}, line {number} is damaged: {line[:60]!r}.",
                "Remove the line, or run again into another folder.",
            ) from error
    return rows


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

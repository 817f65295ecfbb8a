"""Runs a job in its folder: the log, the compilation cache, how the run ended."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import jax

from moejax.config import Config
from moejax.core import processes
from moejax.core.errors import ConfigError, MoejaxError
from moejax.files import cache_root
from moejax.runs import RunFolder


class Terminated(KeyboardInterrupt):
    """SIGTERM, for jobs that do not handle it themselves: a job scheduler ends the run."""

    status = 128 + signal.SIGTERM


def execute(
    config: Config,
    out: Path,
    command: Sequence[str],
    instead: Callable[[Any], Any] = lambda job: job,
) -> RunFolder:
    """Runs the job of `config` in the folder `out`, new or of the same run, and marks its end.

    instead: makes of it the job that is run, itself if nothing is said.

    What the job prints goes to log.txt too. run.json ends as finished, failed or interrupted; an
    error passes on to the caller. RunError when `out` holds another run or cannot be written,
    ConfigError for a job of one process in one of several. Of several processes only the first
    writes, but for checkpoints, of which each writes its part.
    """
    job = instead(config.job())
    if processes.count() > 1 and not getattr(job, "in_processes", False):
        raise ConfigError(
            f"{type(job).__name__} runs in one process, and this is one of {processes.count()}.",
            "Start it once, without --processes.",
        )
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    made = processes.on_first(
        lambda: RunFolder.create(out, type(job).__name__, config.text, list(command))
    )
    folder = made or RunFolder.join(out)
    with folder, _logged(folder) if folder.writes else _silent(), _ended_by_sigterm():
        try:
            job.run(folder)
        except MoejaxError as error:
            raise config.explain(error) from error
    return folder


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated, unless the job installs a handler of its own.

    Of several processes JAX has one installed, by which the job stops all of them together.
    """
    if threading.current_thread() is not threading.main_thread() or processes.count() > 1:
        yield
        return

    def stop(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _silent() -> Iterator[None]:
    """Prints nothing but errors: another process says what there is to say."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _logged(folder: RunFolder) -> Iterator[None]:
    """Copies what is printed to the log, and the traceback of what goes wrong."""
    with folder.log_path.open("a", encoding="utf-8", errors="replace", buffering=1) as log:
        streams = sys.stdout, sys.stderr
        copies = [_Copied(stream, log) for stream in streams]
        sys.stdout, sys.stderr = copies
        try:
            yield
        except BaseException:
            copies[1].copy(traceback.format_exc())
            raise
        finally:
            sys.stdout, sys.stderr = streams
            for copied in copies:
                copied.finish()


class _Copied(io.TextIOBase):
    """A text stream whose whole lines go to a log too, without what draws progress bars."""

    _CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

    def __init__(self, stream: TextIO, log: TextIO):
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        """Writes to the stream, and to the log at the end of each line."""
        self.copy(text)
        return self._stream.write(text)

    def copy(self, text: str) -> None:
        """Writes to the log only."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            plain = self._CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2])
            with suppress(OSError):  # a full disk must not end a run over its log
                self._log.write(f"{plain}\n")

    def finish(self) -> None:
        """Logs a last line that had no end."""
        if self._line:
            self.copy("\n")

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream: rich asks for it to choose its characters."""
        return self._stream.encoding

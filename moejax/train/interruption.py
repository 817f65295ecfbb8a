"""A polite stop: the first SIGTERM or Ctrl-C asks, the second one kills."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from jax.experimental import multihost_utils

from moejax.core import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Context in which the first signal only asks for a stop; outside of it all is as before.

    signal: the number that came to this process, None so far. A second signal acts as it would
    have without this. In a thread other than the main one, where Python allows no handlers,
    nothing is caught.

    Of several processes, SIGTERM to any stops all after the same step. JAX's coordination service
    takes it from a handler of its own, which is left alone, and settles the step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}
        self._several = processes.count() > 1

    def stops_after(self, step: int) -> int | None:
        """The signal for which the run stops after `step`, None to go on.

        Several processes ask after every step, all of them from the same one on.
        """
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            return self.signal or signal.SIGTERM
        return None if self._several else self.signal

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT,) if self._several else SIGNALS
            self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._put_back()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # for the handler of the coordination service

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

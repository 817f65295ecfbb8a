"""Several processes of one run on this machine: started, watched, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from moejax.core import RunError
from moejax.mesh.processes import ADDRESS, COUNT, ID

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 30.0  # a process that lost another one may wait for it for ever
_LOOK_SECONDS = 0.1
_OUTPUT_SECONDS = 5.0  # what a child started itself may hold its pipe open
_STOPS = (signal.SIGTERM, signal.SIGINT)


def launch(
    command: Sequence[str],
    processes: int,
    *,
    environ: Mapping[str, str] = os.environ,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Runs `command` so many times, as the processes of one run that meet on loopback.

    Gives 0 when all end well. When one fails, stderr says which and how, the others have
    `grace_seconds` to end by themselves and are then killed; given back is the status of the one
    that failed first, 128 + signal where a signal ended it. SIGTERM and Ctrl-C are passed on to
    all as SIGTERM, a second one kills them. The output of all but the first comes with their
    numbers in front.
    """
    if processes < 1:
        raise RunError(f"{processes} processes run nothing.", "Start at least 1.")
    address = f"{LOOPBACK}:{_free_port()}"
    children: list[subprocess.Popen[bytes]] = []
    outputs: list[threading.Thread] = []
    before = {number: signal.getsignal(number) for number in _STOPS if _in_main_thread()}
    asked: list[int] = []
    for number in before:
        signal.signal(number, lambda got, _: asked.append(got))
    try:
        for number in range(processes):
            own = {**environ, ADDRESS: address, COUNT: str(processes), ID: str(number)}
            children.append(_start(command, own, number))
            outputs += _pass_on(children[-1], number)
        return _watch(children, grace_seconds, asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for output in outputs:
            output.join(_OUTPUT_SECONDS)


def _watch(children: list[subprocess.Popen[bytes]], grace: float, asked: list[int]) -> int:
    status, deadline, passed = 0, None, 0
    while any(child.poll() is None for child in children):
        if len(asked) > passed:
            passed = len(asked)
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM if passed == 1 else signal.SIGKILL)
        if deadline is None and (failed := _failed(children)) is not None:
            status, deadline = _status(children[failed]), time.monotonic() + grace
            _say(
                f"process {failed} of {len(children)} {_end(children[failed])}; "
                f"the others have {grace:g} s to end."
            )
        if deadline is not None and time.monotonic() > deadline:
            left = [number for number, child in enumerate(children) if child.poll() is None]
            for number in left:
                children[number].kill()
            _say(f"killed {_listed(left)} after {grace:g} s.")
            deadline = float("inf")
        time.sleep(_LOOK_SECONDS)
    if status == 0 and (failed := _failed(children)) is not None:
        status = _status(children[failed])
        _say(f"process {failed} of {len(children)} {_end(children[failed])}.")
    return status


def _start(command: Sequence[str], environ: dict[str, str], number: int) -> subprocess.Popen[bytes]:
    """A child in a session of its own: Ctrl-C at the terminal is for the launcher alone."""
    pipe = None if number == 0 else subprocess.PIPE
    return subprocess.Popen(
        list(command), env=environ, stdout=pipe, stderr=pipe, start_new_session=True
    )


def _pass_on(child: subprocess.Popen[bytes], number: int) -> list[threading.Thread]:
    """Threads that print what a child writes to its pipes, until it closes them."""

    def copy(stream: IO[bytes], to: IO[str]) -> None:
        with stream:
            for line in stream:
                print(f"[{number}] {line.decode(errors='replace').rstrip()}", file=to, flush=True)

    pipes = ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    threads = [
        threading.Thread(target=copy, args=(stream, to), daemon=True)
        for stream, to in pipes
        if stream is not None
    ]
    for thread in threads:
        thread.start()
    return threads


def _failed(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first child that ended with a status other than 0."""
    return next((number for number, child in enumerate(children) if child.poll()), None)


def _status(child: subprocess.Popen[bytes]) -> int:
    return 128 - child.returncode if child.returncode < 0 else child.returncode


def _end(child: subprocess.Popen[bytes]) -> str:
    code = child.returncode
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _listed(numbers: Sequence[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _say(what: str) -> None:
    print(f"moejax: {what}", file=sys.stderr, flush=True)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]

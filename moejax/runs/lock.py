"""One writer per run folder: an advisory lock that the system drops when the process dies."""

from __future__ import annotations

import os
from pathlib import Path

from moejax.core.errors import RunError

try:
    import fcntl
except ImportError:  # no advisory locks on Windows
    fcntl = None  # type: ignore[assignment]

_HELD: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Claims `folder` for this process; RunError when another process has it."""
    key = folder.resolve()
    if fcntl is None or key in _HELD:
        return
    try:
        number = os.open(key / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}.",
            "Choose a folder you may write to with --out.",
        ) from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(number)
        raise RunError(
            f"{folder} is in use by another process.",
            "Wait until it ends, or choose another folder with --out.",
        ) from error
    except OSError:  # a file system without locks, such as a mounted bucket
        os.close(number)
        return
    _HELD[key] = number


def release(folder: Path) -> None:
    """Gives `folder` up; does nothing when this process does not hold it."""
    number = _HELD.pop(folder.resolve(), None)
    if number is not None:
        os.close(number)

"""Writes that are either whole or absent: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moejax.core.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class _Foreign(Exception):
    """An error that passes through `atomic_file` unchanged."""

    def __init__(self, error: OSError):
        self.error = error


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Opens a binary file that appears under `path` only if the block ends well.

    Raises RunError when the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            try:
                yield file
            except OSError as error:
                if error.errno not in _FULL:
                    raise _Foreign(error) from error  # of what the block reads, not of this file
                raise
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except _Foreign as foreign:
        raise foreign.error from None
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Writes `content` (text as UTF-8) under `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path | str, data: Any) -> None:
    """Writes `data` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The JSON in `path`; RunError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read: {error}.", "Was it written by an interrupted run?"
        ) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path} cannot be written: {error.strerror or error}.",
        "Free space or choose another folder with --out.",
    )

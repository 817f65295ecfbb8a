"""Atomic writes: whole or absent."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from moejax.core import RunError
from moejax.core.atomic import atomic_file, read_json, write_atomically, write_json


@contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_writer_leaves_nothing(tmp_path):
    """Catches a file written in place, and a temporary file left behind."""
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        _ = 1 // 0
    assert os.listdir(tmp_path) == []


def test_a_failing_writer_keeps_the_old_file(tmp_path):
    """Catches a writer that truncates the old file first."""
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_a_run_error_and_leaves_nothing(tmp_path):
    """Catches an OSError with a traceback, or a truncated file that looks whole."""
    path = tmp_path / "big.bin"
    with pytest.raises(RunError, match=r"big\.bin"), file_size_limit(1000):
        write_atomically(path, b"x" * 100_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", [None, "old"])
def test_a_killed_process_leaves_no_half_written_file(tmp_path, before):
    """Catches writes under the final name: SIGKILL runs no cleanup."""
    path = tmp_path / "model.bin"
    if before is not None:
        write_atomically(path, before)
    code = (
        "import os, signal, sys\n"
        "from moejax.core.atomic import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 50_000)\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == before
    seen = [name for name in os.listdir(tmp_path) if not name.startswith(".")]
    assert seen == ([] if before is None else ["model.bin"])


def test_a_folder_that_cannot_be_is_a_run_error(tmp_path):
    """Catches a bare NotADirectoryError."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        write_atomically(tmp_path / "file" / "a.txt", "text")


def test_json_round_trip_and_folders_are_made(tmp_path):
    """Catches text written in another encoding, or a parent folder that must exist before."""
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"é": [1, 2.5, None, True]})
    assert read_json(path) == {"é": [1, 2.5, None, True]}


def test_json_refuses_nan_and_leaves_nothing(tmp_path):
    """Catches NaN tokens, which are not JSON and which other readers refuse."""
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": math.nan})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b""])
def test_damaged_json_is_a_run_error(tmp_path, content):
    """Catches a JSONDecodeError or UnicodeDecodeError that reaches the user."""
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json"):
        read_json(path)


def test_an_error_of_the_writers_source_is_not_called_a_full_disk(tmp_path):
    """Catches an atomic write that blames its own file for one its block could not read."""
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.bin") as file:
        file.write((tmp_path / "absent").read_bytes())
    assert list(tmp_path.iterdir()) == []

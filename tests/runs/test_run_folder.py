"""The run folder: one run per folder, whole files, clear refusals."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager

import pytest

from moejax.core import RunError
from moejax.runs import FAILED, FINISHED, INTERRUPTED, RUNNING, RunFolder, config_hash
from moejax.runs import folder as folder_module

CONFIG = "Compress.bits = 3\n"
COMMAND = ["moejax", "run", "x.gin"]


@contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_folder_says_what_runs(tmp_path):
    """Catches a run.json without what is needed to run again."""
    run = RunFolder.create(tmp_path / "run", "compress", CONFIG, COMMAND)
    facts = json.loads(run.run_path.read_text())
    assert facts["job"] == "compress"
    assert facts["command"] == COMMAND
    assert facts["config_sha256"] == config_hash(CONFIG)
    assert facts["status"] == RUNNING
    assert facts["versions"]["jax"] and facts["versions"]["python"]
    assert facts["device"]["platform"] == "cpu" and facts["device"]["count"] >= 1
    assert "git" in facts and facts["started"]
    assert run.config_path.read_text() == CONFIG
    assert not run.resumed
    run.finish()


def test_the_same_run_is_taken_up_again(tmp_path):
    """Catches a resume that is refused, or that forgets when the run began."""
    first = RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
    first.finish(INTERRUPTED)
    again = RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
    assert again.resumed
    assert again.facts["started"] == first.facts["started"]
    assert len(again.facts["resumed"]) == 1
    assert again.facts["status"] == RUNNING
    again.finish()


@pytest.mark.parametrize(("job", "config"), [("train", "other"), ("compress", CONFIG)])
def test_another_run_is_refused(tmp_path, job, config):
    """Catches two runs that mix their metrics in one folder."""
    RunFolder.create(tmp_path, "train", CONFIG, COMMAND).finish()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError, match="--out") as caught:
        RunFolder.create(tmp_path, job, config, COMMAND)
    assert str(tmp_path) in caught.value.problem
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_that_failed_before_it_made_anything_gives_its_folder_up(tmp_path):
    """Catches a mended config that is refused for the typo before it, a log of both, and a failed
    run whose ledger another one writes over."""
    for kept in ((), ("ledger.jsonl",)):
        path = tmp_path / f"run {len(kept)}"
        with pytest.raises(ValueError), RunFolder.create(path, "compress", CONFIG, COMMAND) as run:
            run.log_path.write_text("ValueError\n")
            for name in kept:
                (path / name).write_text("{}\n")
            raise ValueError
        if kept:
            with pytest.raises(RunError, match="another config"):
                RunFolder.create(path, "compress", "Compress.bits = 4\n", COMMAND)
            continue
        mended = RunFolder.create(path, "compress", "Compress.bits = 4\n", COMMAND)
        assert not mended.resumed and mended.facts["earlier"] == []
        assert mended.config_path.read_text() == "Compress.bits = 4\n"
        assert not mended.log_path.exists()
        mended.finish()


def test_a_folder_of_other_files_is_refused(tmp_path):
    """Catches a run that scatters its files in somebody's home folder."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    """Catches two live processes that append to one metrics file."""
    code = (
        "import fcntl, os, sys\n"
        "n = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(n, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="in use"):
            RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
        other.stdin.close()
    RunFolder.create(tmp_path, "train", CONFIG, COMMAND).finish()


def test_an_unwritable_place_is_refused(tmp_path):
    """Catches an OSError with a traceback where the folder cannot be made."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="--out"):
            RunFolder.create(path, "train", CONFIG, COMMAND)


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    """Catches permission errors that surface only after hours; root is refused by hand."""

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(RunError, match="Permission denied"):
        RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
    assert not (tmp_path / "run.json").exists()


def test_a_disk_without_room_is_refused_at_once(tmp_path, monkeypatch):
    """Catches a run that starts although its disk is full."""
    usage = namedtuple("usage", "total used free")(100, 99, 1)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="free space"):
        RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_leaves_no_half_written_file(tmp_path):
    """Catches a truncated run.json, and a folder that stays locked after the failure."""
    with pytest.raises(RunError, match="cannot be written"), file_size_limit(100):
        RunFolder.create(tmp_path, "train", CONFIG, COMMAND)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up, so another process may begin


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, FINISHED), (ValueError("bad"), FAILED), (KeyboardInterrupt(), INTERRUPTED)],
)
def test_the_folder_records_how_the_run_ended(tmp_path, error, status):
    """Catches a failed run that says it finished."""
    try:
        with RunFolder.create(tmp_path, "train", CONFIG, COMMAND):
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    facts = RunFolder.open(tmp_path).facts
    assert facts["status"] == status
    assert facts.get("error") == ("ValueError: bad" if status == FAILED else None)


def test_open_refuses_what_is_no_run(tmp_path):
    """Catches a report drawn from any folder with JSON in it."""
    with pytest.raises(RunError, match=r"run\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(RunError, match="not of a run"):
        RunFolder.open(tmp_path)

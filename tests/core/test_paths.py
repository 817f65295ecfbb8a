"""Folders on disks and in buckets."""

from pathlib import Path

import pytest
from etils import epath

from moejax.core import RunError, paths


def test_a_path_on_a_disk_is_absolute(monkeypatch, tmp_path):
    """Catches checkpoints that move with the working folder."""
    monkeypatch.chdir(tmp_path)
    assert paths.folder_of("runs/a") == tmp_path / "runs" / "a"
    assert isinstance(paths.folder_of(tmp_path), Path)


def test_a_bucket_keeps_its_name(monkeypatch):
    """Catches gs://bucket read as the folder gs:/bucket of the working folder."""
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", lambda self: False)
    assert paths.folder_of("gs://bucket/run").as_posix() == "gs://bucket/run"


def test_a_store_out_of_reach_is_named(monkeypatch):
    """Catches a run that trains for an hour before it finds out that it cannot save."""

    def refuse(self):
        raise ImportError("no driver\nfor this")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", refuse)
    with pytest.raises(RunError, match="gs://bucket/run cannot be reached: no driver"):
        paths.folder_of("gs://bucket/run")

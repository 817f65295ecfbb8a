"""Provenance: the commit is that of moejax, or none."""

from __future__ import annotations

import subprocess

import pytest

import moejax
from moejax.runs import git_state, versions


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package in it that stands for moejax."""
    package = tmp_path / "moejax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(moejax, "__file__", str(package / "__init__.py"))
    return tmp_path


def test_a_package_inside_somebody_elses_repository_has_no_commit(checkout):
    """Catches an installed moejax that reports the commit of the user's own project."""
    (checkout / "notes.txt").write_text("")
    git(checkout, "add", "notes.txt")
    git(checkout, "commit", "-qm", "notes")
    assert git_state() is None


def test_changed_code_is_dirty_and_other_files_are_not(checkout):
    """Catches results attributed to a commit that did not make them."""
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "code")
    (checkout / "notes.txt").write_text("")
    state = git_state()
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (checkout / "moejax" / "__init__.py").write_text("x = 1\n")
    state = git_state()
    assert state is not None and state["dirty"] is True


def test_versions_name_what_decides_numbers():
    """Catches a run that cannot be told from one on another JAX."""
    assert {"python", "moejax", "jax", "jaxlib", "flax", "numpy"} <= set(versions())

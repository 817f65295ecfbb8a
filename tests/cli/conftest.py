from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tests.config.conftest import TOY


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with toy.gin, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.gin").write_text(TOY, encoding="utf-8")
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", None)

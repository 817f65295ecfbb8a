from __future__ import annotations

from pathlib import Path

import pytest

TOY = """\
import tests.config.toy_specs
bits = 3
run.job = @ToyJob()
ToyJob.recipe = (@attention/ToyGrid(), @experts/ToyGrid())
ToyGrid.group = 64
attention/ToyGrid.bits = %bits
experts/ToyGrid.bits = @ToyProgram()
experts/ToyProgram.average_bits = 2.5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with toy.gin in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.gin").write_text(TOY, encoding="utf-8")
    return tmp_path

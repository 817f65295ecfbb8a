"""Every shipped config, in full: a changed default must show in a golden file."""

from __future__ import annotations

import pytest

from moejax.config import golden
from tests.config.conftest import TOY

CONFIGS = golden.shipped_configs()
NAMES = [str(config.relative_to(golden.CHECKOUT)) for config in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_shipped_config_says_what_its_golden_file_says(config, monkeypatch):
    """Catches a default, include or name that changed under a config. Mend: golden --write."""
    monkeypatch.chdir(golden.CHECKOUT)
    path = golden.golden_path(config)
    assert path.is_file(), "python -m moejax.config.golden --write"
    assert golden.golden_text(config) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_shipped_config_is_whole_in_its_expanded_text(config, monkeypatch, tmp_path):
    """Catches a config that a run folder could not repeat from its config.gin."""
    monkeypatch.chdir(tmp_path)
    text = golden.golden_text(config)
    (tmp_path / "again.gin").write_text(text)
    assert golden.golden_text(tmp_path / "again.gin") == text


def test_no_golden_file_is_left_over():
    """Catches golden files of configs that are gone."""
    wanted = {golden.golden_path(config) for config in golden.shipped_configs()}
    assert set((golden.CHECKOUT / "tests" / "golden").rglob("*.txt")) <= wanted


def test_golden_files_are_written_compared_and_removed(tmp_path, monkeypatch, capsys):
    """Catches a comparison that cannot fail, and parts to include that are taken for jobs."""
    (tmp_path / "configs" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    toy, part = tmp_path / "configs" / "toy.gin", tmp_path / "configs" / "sub" / "part.gin"
    toy.write_text(TOY)
    part.write_text("m = 3\na/repeat.times = %m\nrepeat.item = 'x'\n")
    assert golden.main([], tmp_path) == 1
    assert golden.main(["--write"], tmp_path) == 0
    assert golden.main([], tmp_path) == 0
    golden_folder = tmp_path / "tests" / "golden"
    text = (golden_folder / "sub" / "part.txt").read_text()
    assert text == "a/repeat.times = %m\nm = 3\nrepeat.item = 'x'\n"
    toy.write_text(TOY.replace("bits = 3", "bits = 2"))
    capsys.readouterr()
    assert golden.main([], tmp_path) == 1
    assert capsys.readouterr().out == "tests/golden/toy.txt: stale\n"
    part.unlink()
    assert golden.main(["--write"], tmp_path) == 0
    assert [path.name for path in golden_folder.rglob("*.txt")] == ["toy.txt"]

"""What README and docs tell a reader to type or to open is there."""

import re

import pytest

from moejax.config import golden, load_config
from moejax.config.search import find_config
from moejax.jobs.study import Compress

README = (golden.CHECKOUT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "docs/exported_models.md")


def test_the_config_that_is_shown_is_a_config(tmp_path, monkeypatch):
    """Catches a binding that was renamed everywhere but where a newcomer copies it from."""
    (block,) = (b for b in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "run.job" in b)
    (tmp_path / "shown.gin").write_text(block)
    monkeypatch.chdir(tmp_path)
    job = load_config("shown").job()
    assert isinstance(job, Compress) and len(job.recipe) == 2
    assert job.text != job.calibration


@pytest.mark.parametrize("page", PAGES)
def test_named_configs_and_links_are_there(page, monkeypatch):
    """Catches `moejax run` of a config that moved, and a link into nothing."""
    monkeypatch.chdir(golden.CHECKOUT)
    text = (golden.CHECKOUT / page).read_text(encoding="utf-8")
    for name in re.findall(r"moejax (?:run|plan) ([a-z][\w./]*)", text):
        assert find_config(name).is_file()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (golden.CHECKOUT / page).parent.joinpath(link).exists(), link


def test_the_python_that_is_shown_runs_as_far_as_names_go():
    """Catches a function of the public face that was renamed or moved."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
    known: dict = {}
    exec("\n".join(lines), known)
    for owner, name in re.findall(r"\b(models|weights)\.(\w+)", block):
        assert hasattr(known[owner], name), f"{owner}.{name}"

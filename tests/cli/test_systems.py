"""The list of systems, from the headers of their gin files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from moejax.cli.main import main
from moejax.cli.systems import System, markdown, read_system, read_systems, show
from moejax.config.golden import CHECKOUT
from moejax.core.errors import ConfigError

HEADER = """\
# MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs. arXiv:2410.06270.
# Follows   PMQ's integer program per layer,
#           exponents of the paper.
# Deviates  from the released solver | a bar.
# Headline  Mixtral-8x7B at 2.54 bits: 76.6 % smaller.
# Found     7 % more perplexity.
# Check     tests/systems/quantization/test_mc_moe.py

# Not part of the header.
include 'models/reference.gin'
"""
MC_MOE = System(
    family="quantization",
    slug="mc_moe",
    title="MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs",
    arxiv="2410.06270",
    follows="PMQ's integer program per layer, exponents of the paper.",
    deviates="from the released solver | a bar.",
    headline="Mixtral-8x7B at 2.54 bits: 76.6 % smaller.",
    found="7 % more perplexity.",
    check="tests/systems/quantization/test_mc_moe.py",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "configs" / "systems" / "quantization").mkdir(parents=True)
    (tmp_path / "configs" / "systems" / "quantization" / "mc_moe.gin").write_text(HEADER)
    return tmp_path / "configs" / "systems"


def test_a_header_is_read_whole(root):
    """Catches lost continuation lines, an id left in the title, and comments after the header."""
    assert read_systems(root) == [MC_MOE]


def test_a_paper_without_arxiv_id(root):
    """Catches a reader that wants an id for every system."""
    path = root / "quantization" / "mc_moe.gin"
    path.write_text(HEADER.replace(" arXiv:2410.06270.", ""))
    assert read_system(path, root).arxiv == ""


@pytest.mark.parametrize("field", ["title", "follows", "deviates", "headline", "found", "check"])
def test_an_incomplete_header_is_an_error(root, field):
    """Catches systems that keep quiet about their source, deviations or check."""
    path = root / "quantization" / "mc_moe.gin"
    kept = [line for line in HEADER.splitlines() if not line[2:].lower().startswith(field)]
    path.write_text("\n".join(kept[1:] if field == "title" else kept))
    with pytest.raises(ConfigError, match=f"quantization/mc_moe.gin: its header has no {field}"):
        read_systems(root)


def test_the_table_and_the_page(root, monkeypatch, capsys):
    """Catches fields in the wrong column, and a bar that breaks a Markdown table."""
    console = Console(file=io.StringIO(), width=200)
    show([MC_MOE], console)
    for text in ("quantization/mc_moe", "arXiv:2410.06270", "76.6 %", "7 % more", "1 systems"):
        assert text in console.file.getvalue()
    row = markdown([MC_MOE]).splitlines()[-1]
    assert row.startswith(
        "| mc_moe | MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs ([2410"
    )
    assert r"solver \| a bar." in row and "76.6 % smaller. | 7 % more" in row
    assert row.endswith("| `tests/systems/quantization/test_mc_moe.py` |")
    monkeypatch.chdir(root.parent.parent)
    assert main(["systems", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown([MC_MOE])


def test_shipped_headers_are_complete():
    """Catches a shipped system whose header lacks a field."""
    shipped = CHECKOUT / "configs" / "systems"
    slugs = [system.slug for system in read_systems(shipped)]
    assert len(slugs) == len(set(slugs))

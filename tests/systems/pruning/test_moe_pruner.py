"""MoE-Pruner (arXiv:2410.12013) on nano, against Wanda and magnitude."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("pruning/moe_pruner", tmp_path_factory.mktemp("moe_pruner"), NANO)


@pytest.mark.parametrize("pattern", ["50 %", "60 %", "2:4"])
def test_masks_differ_at_equal_bytes(ran, pattern):
    """Catches methods that store more, and a gate-weighted score that is Wanda's."""
    arms = [ran.result.arm(f"{m}, {pattern}") for m in ("MoE-Pruner", "Wanda", "magnitude")]
    assert len({arm.stored_bytes for arm in arms}) == 1
    assert len({arm.average.perplexity for arm in arms}) == 3


@pytest.mark.parametrize("pattern", ["50 %", "2:4"])
def test_activations_matter(ran, pattern):
    """Catches scores multiplied with the inputs of another expert: nearly all outputs are nearer
    than those of magnitude pruning."""
    rows = [row for row in ran.ledger.last(f"Wanda, {pattern}").values() if row.output_error]
    assert len(rows) > 40
    assert sum(row.output_error < row.nearest_error for row in rows) / len(rows) > 0.9

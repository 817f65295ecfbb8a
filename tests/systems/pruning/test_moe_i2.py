"""MoE-I2 (arXiv:2411.01016) on the nano model: searched experts, ranks by importance."""

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=4096",
    "calibration/Text.skip_bytes=4096",
    "calibration/Text.bytes_per_group=8192",
    "ProportionalRanks.mean_rank=16",
    "ProportionalRanks.alpha=0.1",  # few ranks, few programs
    "LossIncrease.windows=2",
    "SearchedDrop.windows=2",
    "Study.arms=(@reference/Arm(),@search/Arm(),@frequent/Arm(),@whole/Arm())",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("pruning/moe_i2", tmp_path_factory.mktemp("moe_i2"), NANO)


def test_a_quarter_of_the_experts_is_gone(ran):
    """Catches layers that lose their share each instead of together, and rows of what is left."""
    rows = ran.ledger.last("a quarter of the experts dropped, searched").values()
    assert sum(bool(row.lineage) for row in rows) == 3 * 4
    searched = ran.result.arm("a quarter of the experts dropped, searched")
    assert searched.expert_bytes == ran.result.arm("reference").expert_bytes * 3 // 4


def test_both_stages_leave_experts_of_several_ranks(ran):
    """Catches a second stage that decides on the experts of the model before the first."""
    rows = [row for row in ran.ledger.last("MoE-I2").values() if not row.lineage]
    sizes = {row.stored_bytes for row in rows}
    assert len(rows) == 3 * 12 and len(sizes) > 1
    mean = sum(row.stored_bytes for row in rows) / len(rows)
    assert mean <= 16 * (64 + 64) * 2

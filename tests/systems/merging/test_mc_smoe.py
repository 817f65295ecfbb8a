"""M-SMoE and its distillation (arXiv:2310.01334) on nano."""

import pytest

from tests.systems.running import NANO, RECOVERY, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    sizes = ["groups = 4", "steps = 40", "rank = 8", "rank_alone = 14"]  # of 64 x 64
    schedule = ["prune_warmup = 5", "prune_settled = 10"]
    overrides = [*NANO, *RECOVERY, *sizes, *schedule]
    return run_system("merging/mc_smoe", tmp_path_factory.mktemp("mc_smoe"), overrides)


def test_merged_models_take_half_of_the_experts_bytes(ran):
    """Catches a threshold over all layers that keeps another number than was asked for."""
    base = ran.result.arm("reference")
    for name in ("M-SMoE, 1/2", "M-SMoE, 1/2, distilled", "random groups, 1/2, seed 0"):
        assert ran.result.arm(name).expert_bytes == base.expert_bytes / 2


def test_distillation_makes_good_a_part_of_the_loss(ran):
    """Catches a recovery that trains a copy and gives back the model it got."""
    assert ran.damage("M-SMoE, 1/2, distilled") < 0.7 * ran.damage("M-SMoE, 1/2")


def test_dominant_experts_are_the_most_used(ran):
    """Catches groups that are named after their least used member."""
    rows = [r for r in ran.ledger if r.arm == "M-SMoE, 1/2" and r.matrix == "moe.experts.up"]
    kept = [r.tokens for r in rows if not r.gone]
    gone = [r.tokens for r in rows if r.gone]
    assert len(kept) == 2 * 4 and sum(kept) > sum(gone)


def test_low_rank_and_channels_take_what_low_rank_alone_takes(ran):
    """Catches an S that is stored whole, or a control that stores it too: two bytes more for the
    number of each of 12 channels."""
    whole, alone = (
        ran.result.arm(name)
        for name in ("MC-SMoE: low rank and 3 of 16 channels", "low rank alone, the same bytes")
    )
    assert whole.expert_bytes - alone.expert_bytes == 2 * 4 * 3 * 12 * 2
    assert alone.expert_bytes < ran.result.arm("M-SMoE, 1/2").expert_bytes / 2


def test_training_takes_the_channels_that_are_not_stored(ran):
    """Catches S stored from a model whose channels were never pruned, or grew back."""
    rows = [row for row in ran.ledger if row.pass_name == "StoreChannels"]
    assert len(rows) == 2 * 2 * 4 * 3 and max(row.relative_error for row in rows) < 0.005

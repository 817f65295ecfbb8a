"""ResMoE (arXiv:2503.06881) on nano: centres at equal bytes."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    overrides = [*NANO, "rank = 8", "half/LowRankResidual.rank = 16", "AsymmetricGrid.group = 32"]
    overrides.append("direct_sparsity = 0.625")  # the base is 1 / 8 of the weights of 8 experts
    return run_system("decomposition/resmoe", tmp_path_factory.mktemp("resmoe"), overrides)


def test_centres_take_equal_bytes(ran):
    """Catches a control that stores less."""
    low = [
        ran.result.arm(n).expert_bytes
        for n in ("barycentre, low rank", "plain mean, low rank", "expert 0, low rank")
    ]
    assert len(set(low)) == 1 and low[0] < ran.result.arm("reference").expert_bytes / 2


def test_more_rank_loses_less(ran):
    """Catches singular values in the wrong order."""
    assert ran.damage("barycentre, twice the rank") < ran.damage("barycentre, low rank")


def test_a_barycentre_is_nearer_to_the_experts(ran):
    """Catches a centre without transport: its residuals at equal rank are larger in the mean."""

    def error(arm):
        return sum(row.relative_error for row in ran.ledger if row.arm == arm)

    assert error("barycentre, low rank") < error("expert 0, low rank")


def test_pruned_residuals_take_what_pruned_experts_take(ran):
    """Catches zeros that are stored, and a base that is not counted or counted once per expert."""
    sparse, direct = "barycentre, residuals 75 % zeros", "experts pruned to the same bytes"
    assert ran.result.arm(sparse).expert_bytes == ran.result.arm(direct).expert_bytes
    rows = [row for row in ran.ledger if row.arm == sparse]
    assert sum(row.stored_bytes for row in rows) == ran.result.arm(sparse).expert_bytes
    assert ran.damage(sparse) > 0

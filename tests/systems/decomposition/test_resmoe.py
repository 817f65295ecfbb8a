"""ResMoE (arXiv:2503.06881) on nano: centres at equal bytes."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    overrides = [*NANO, "rank = 8", "half/LowRankResidual.rank = 16", "AsymmetricGrid.group = 32"]
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

"""ASVD (arXiv:2312.05821) on the nano model: scaled truncation, and ranks under a budget."""

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=16384",
    "calibration/Text.skip_bytes=16384",
    "UniformRank.rank=24",
    "RankBudget.mean_rank=24",
    "RankBudget.ranks=(12, 24, 36)",
    "RankBudget.cost=@RoutedError()",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("decomposition/asvd", tmp_path_factory.mktemp("asvd"), NANO)


def test_scaling_helps(ran):
    """Catches scales that are not divided out, or taken to the wrong power."""
    assert ran.damage("ASVD, rank 64") < ran.damage("plain SVD, rank 64")


def test_a_budget_of_ranks_takes_no_more_and_loses_less(ran):
    """Catches a knapsack over ranks whose costs are upside down."""
    equal, budget = (
        ran.result.arm(n) for n in ("ASVD, rank 64", "ASVD, mean rank 64 under a budget")
    )
    assert budget.expert_bytes <= equal.expert_bytes
    assert ran.damage(budget.name) < ran.damage(equal.name)

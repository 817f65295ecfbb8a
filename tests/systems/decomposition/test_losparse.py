"""LoSparse (arXiv:2306.11222) on the nano model: channels besides factors, at equal bytes."""

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=16384",
    "calibration/Text.skip_bytes=16384",
    "low/UniformRank.rank=28",
    "both/UniformRank.rank=22",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("decomposition/losparse", tmp_path_factory.mktemp("losparse"), NANO)


def test_bytes_are_equal_but_for_an_index(ran):
    """Catches a sparse part that is stored whole, or not counted."""
    low, both = (ran.result.arm(n) for n in ("rank 48", "rank 32 and 3 of 16 channels"))
    matrices, channels = 2 * 8 * 3, 12
    assert both.expert_bytes - low.expert_bytes == matrices * channels * 2


def test_rows_that_count_are_worth_their_bytes(ran):
    """Catches channels of least importance kept, or rows added to the low-rank part."""
    rows = ran.ledger.last("rank 32 and 3 of 16 channels").values()
    assert all(row.output_error < 1 for row in rows if row.tokens)
    assert ran.damage("rank 32 and 3 of 16 channels") < 2 * ran.damage("rank 48")

"""SVD-LLM (arXiv:2403.07378) on the nano model: whitened against plain truncation."""

import numpy as np
import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=16384",
    "calibration/Text.skip_bytes=16384",
    "svd64/UniformRank.rank=32",
    "white64/UniformRank.rank=32",
    "svd32/UniformRank.rank=16",
    "white32/UniformRank.rank=16",
    "behind32/UniformRank.rank=16",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("decomposition/svd_llm", tmp_path_factory.mktemp("svd_llm"), NANO)


@pytest.mark.parametrize("rank", [64, 32])
def test_whitening_loses_less_at_equal_bytes(ran, rank):
    """Catches whitening by moments of other rows, or factors whose scale is lost in 16 bits."""
    plain, whitened = (f"{method}, rank {rank}" for method in ("plain SVD", "SVD-LLM"))
    assert ran.result.arm(plain).stored_bytes == ran.result.arm(whitened).stored_bytes
    assert ran.damage(whitened) < 0.9 * ran.damage(plain)


def test_weights_move_further_than_by_the_plain_svd(ran):
    """Catches arms in each other's place: the plain SVD is nearest in weights, never in outputs."""
    error = {
        arm: np.array([r.relative_error for r in ran.ledger.last(arm).values()])
        for arm in ("plain SVD, rank 32", "SVD-LLM, rank 32")
    }
    assert (error["SVD-LLM, rank 32"] >= error["plain SVD, rank 32"] - 1e-3).all()

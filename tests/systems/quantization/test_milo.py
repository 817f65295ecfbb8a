"""MiLo (arXiv:2504.02658) on the nano model: bytes, ranks and errors of every rank policy."""

import numpy as np
import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=4096",
    "calibration/Text.skip_bytes=4096",
    "CompensatedGrid.iterations=4",
    "Study.arms=(@reference/Arm(),@hqq/Arm(),@once/Arm(),@uniform/Arm(),@wide/Arm(),@frequency/Arm())",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/milo", tmp_path_factory.mktemp("milo"), NANO)


def errors(ran, arm):
    rows = ran.ledger.last(arm).values()
    return np.array([row.relative_error for row in rows if "experts" in row.matrix])


def test_compensators_take_error_away(ran):
    """Catches factors of the wrong sign, and iterations that get worse."""
    alone, once, often = (
        errors(ran, name) for name in ("HQQ, 3 bits", "rank 8, fitted once", "MiLo, rank 8")
    )
    assert (once < alone).all() and (often <= once + 1e-6).all()
    assert often.mean() < 0.96 * once.mean()  # measured 0.94 with 4 iterations


def test_factors_of_three_bits_are_stored_in_three_bits(ran):
    """Catches compensators that are counted or kept in 16 bits."""
    sizes = {
        name: ran.result.arm(name).expert_bytes
        for name in ("HQQ, 3 bits", "MiLo, rank 8", "MiLo, rank 8, factors in 16 bits")
    }
    alone, small, wide = sizes.values()
    numbers = 2 * 8 * 3 * 8 * (64 + 64)  # layers, experts, matrices, rank, inputs and outputs
    assert wide - alone == 2 * numbers
    assert small - alone == numbers * 3 // 8 + numbers // 64 * 4  # float16 scale and zero per group


def test_frequency_shares_the_same_mean_rank(ran):
    """Catches shares that are not of the layer, or ranks by rank of frequency."""
    rows = ran.ledger.last("MiLo, mean rank 8 by frequency").values()
    uniform = ran.result.arm("MiLo, rank 8").expert_bytes
    found = ran.result.arm("MiLo, mean rank 8 by frequency").expert_bytes
    assert abs(found / uniform - 1) < 0.03
    for layer in range(2):
        up = [r for r in rows if r.layer == layer and r.matrix == "moe.experts.up"]
        order = sorted(up, key=lambda row: row.tokens)
        assert [r.stored_bytes for r in order] == sorted(r.stored_bytes for r in up)

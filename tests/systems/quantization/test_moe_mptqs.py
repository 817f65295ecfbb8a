"""MoE-MPTQS (arXiv:2407.14417): a number of experts at 4 bits, drawn at random."""

import numpy as np
import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """On 16 KiB of each group: bytes do not depend on it."""
    root = tmp_path_factory.mktemp("mptqs")
    return run_system("quantization/moe_mptqs", root, ["text/Text.bytes_per_group = 16384"])


def test_all_experts_at_four_bits_cost_the_most(ran):
    """Catches a draw that leaves the chosen experts in 16 bits."""
    assert ran.damage("all experts at 4 bits") > 0
    assert ran.damage("all experts at 4 bits") >= ran.damage("25 % of experts at 4 bits")


def test_predicted_memory_is_measured_memory(ran):
    """Catches experts in float32 beside the quantized ones, and scales that nobody counts."""
    base = ran.result.arm("reference")
    experts = 4 * 16
    whole = base.expert_bytes / experts
    packed = ran.result.arm("all experts at 4 bits").expert_bytes / experts
    for share, name in ((16, "25 %"), (32, "50 %"), (48, "75 %")):
        arm = ran.result.arm(f"{name} of experts at 4 bits")
        assert arm.expert_bytes == share * packed + (experts - share) * whole
        rows = ran.ledger.last(arm.name).values()
        at_four = {(row.layer, row.expert) for row in rows if row.code_bits == 4}
        assert len(at_four) == share


def test_the_draw_is_over_the_whole_model(ran):
    """Catches equal numbers in every layer, which a draw over the model does not give."""
    rows = ran.ledger.last("50 % of experts at 4 bits").values()
    per_layer = np.zeros(4, int)
    for layer, _ in {(row.layer, row.expert) for row in rows if row.code_bits == 4}:
        per_layer[layer] += 1
    assert per_layer.sum() == 32 and len(set(per_layer.tolist())) > 1

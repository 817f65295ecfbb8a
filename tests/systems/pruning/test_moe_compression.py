"""The unified framework of arXiv:2406.02500 on nano: what goes, what is stored, in which order."""

import pytest

from moejax.core import SpecError
from moejax.runs.ledger import DROPPED
from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow
NAME = "pruning/moe_compression"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system(NAME, tmp_path_factory.mktemp("moe_compression"), NANO)


def experts_left(ran, arm):
    rows = ran.ledger.last(arm).values()
    return [
        sum(row.layer == layer and row.matrix.endswith("up") and not row.dropped for row in rows)
        for layer in range(2)
    ]


def test_both_expert_drops_leave_as_many(ran):
    """Catches a global drop that takes its share from every layer, or another share."""
    assert experts_left(ran, "expert drop, 25 % of each layer") == [6, 6]
    assert sum(experts_left(ran, "expert drop, 25 % of all")) == 12
    sizes = {
        ran.result.arm(arm).expert_bytes
        for arm in ("expert drop, 25 % of all", *ran.starting("experts at random"))
    }
    assert sizes == {ran.result.arm("expert drop, 25 % of each layer").expert_bytes}


def test_dropped_layers_leave_no_byte(ran):
    """Catches norms and routers that stay behind their experts, and blocks that keep a mixer."""
    base, layer = ran.result.arm("reference"), ran.result.arm("layer drop, 1")
    assert layer.expert_bytes == base.expert_bytes / 2
    router, norm = 2 * 64 * 8, 2 * 64
    assert base.stored_bytes - layer.stored_bytes == layer.expert_bytes + router + norm
    empty = ran.result.arm("block drop, 2 neighbours")
    assert empty.expert_bytes == 0 and empty.average.delta_nll > 0
    rows = ran.ledger.last("block drop, 1").values()
    assert len({row.layer for row in rows}) == 1
    assert all(row.lineage == (DROPPED,) and not row.stored_bytes for row in rows)


@pytest.mark.parametrize("arm", ["magnitude, 2:4", "Wanda, 2:4", "SparseGPT, 2:4", "Wanda, 50 %"])
def test_half_of_the_weights_is_nine_bits(ran, arm):
    """Catches a mask that is not stored, or dense weights beside it."""
    base = ran.result.arm("reference")
    assert ran.result.arm(arm).bits_per_weight == 9
    assert ran.result.arm(arm).expert_bytes == base.expert_bytes * 9 / 16


def test_trim_and_slim_take_the_same_bytes_in_either_order(ran):
    """Catches a drop that cannot act on pruned experts, and bytes of dropped ones."""
    arms = [ran.result.arm(arm) for arm in ("expert drop, then 2:4", "2:4, then expert drop")]
    assert arms[0].stored_bytes == arms[1].stored_bytes
    assert arms[0].expert_bytes == ran.result.arm("reference").expert_bytes * 0.75 * 9 / 16


def test_every_arm_is_a_model(ran):
    """Catches arms that were not measured."""
    assert all(arm.average.perplexity == arm.average.perplexity for arm in ran.result.arms)
    assert len(ran.result.verdicts) == 5


def test_groups_that_do_not_divide_are_refused(tmp_path):
    """Catches a study that fails in its eleventh arm, after the work of ten."""
    with pytest.raises(SpecError, match="groups of 48 do not divide the 64 inputs of layers.0"):
        run_system(NAME, tmp_path, [*NANO, "NOfM.m = 48"])

"""EdgeMoE (arXiv:2308.14352), its bits: the fewest within a tolerance."""

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
PLAN, TOLERANCE = "EdgeMoE, loss at most 1 % up", 0.01


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("offloading/edgemoe", tmp_path_factory.mktemp("edgemoe"))


def test_no_uniform_plan_within_the_tolerance_is_smaller(ran):
    """Catches a search that stops at the first expert that does not fit."""
    base = ran.result.arm("reference").average
    within = [
        arm
        for arm in map(ran.result.arm, ran.starting("all experts"))
        if arm.average.delta_nll <= TOLERANCE * base.nll_sum / base.tokens
    ]
    assert within
    assert ran.result.arm(PLAN).expert_bytes <= min(arm.expert_bytes for arm in within)


def test_experts_get_different_widths(ran):
    """Catches a plan that knows only one width."""
    bits = {row.code_bits for row in ran.ledger.last(PLAN).values()}
    assert len(bits) == 2 and bits < {2, 4, 8}


def test_what_holds_on_the_profiling_text_nearly_holds_on_other_text(ran):
    """Catches a tolerance that is measured on another model than the one that is saved."""
    base = ran.result.arm("reference").average
    assert ran.damage(PLAN) <= 2 * TOLERANCE * base.nll_sum / base.tokens

"""MoQa (arXiv:2503.21135): precision for several texts at once, and a patch for a new one."""

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow

DOCS, CODE = "significance of docs alone", "significance of code alone"
PATCHED, RANDOM = "MoQa of docs, patched for code", "MoQa of docs, patched at random"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/moqa", tmp_path_factory.mktemp("moqa"))


def on(ran, arm, group):
    """Nats per token lost on the text of one group."""
    return {d.group: d.delta_nll for d in ran.result.arm(arm).domains}[group]


@pytest.mark.parametrize("single", [DOCS, CODE])
def test_the_plan_for_both_texts_loses_no_more_than_a_plan_for_one(ran, single):
    """Catches a significance that reads one of its groups only, or the wrong one."""
    assert ran.damage("MoQa, 2.5 bits") <= ran.damage(single)


def test_the_patch_recovers_more_than_chance(ran):
    """Catches channels ranked by the least sensitivity, or by the rows of another expert."""
    gap = on(ran, DOCS, "code")
    recovered = {arm: gap - on(ran, arm, "code") for arm in (PATCHED, RANDOM)}
    assert recovered[PATCHED] > max(0, recovered[RANDOM])


def test_both_patches_take_the_same_bytes(ran):
    """Catches a comparison of tables of unequal size, and a table that nobody counts."""
    base, plain = ran.result.arm("reference"), ran.result.arm(DOCS)
    patched, random = (ran.result.arm(arm) for arm in (PATCHED, RANDOM))
    assert patched.stored_bytes == random.stored_bytes
    assert 0 < patched.expert_bytes - plain.expert_bytes <= 0.025 * base.expert_bytes

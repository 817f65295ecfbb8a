"""HC-SMoE (arXiv:2410.08589) on nano: clusters of outputs against other groups."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow
ARMS = ("eight", "single", "complete", "ward", "msmoe", "random0", "random1", "random2")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    arms = ", ".join(f"@{arm}/Arm()" for arm in ("reference", *ARMS))
    overrides = [*NANO, "groups = 4", f"Study.arms = ({arms})"]
    return run_system("merging/hc_smoe", tmp_path_factory.mktemp("hc_smoe"), overrides)


def test_half_of_the_experts_take_half_of_the_bytes(ran):
    """Catches experts that are merged but stored twice, and a router that loses rows."""
    base = ran.result.arm("reference")
    for arm in ran.result.arms[1:]:
        assert arm.expert_bytes == base.expert_bytes / 2
        rest = arm.stored_bytes - arm.expert_bytes
        assert rest - (base.stored_bytes - base.expert_bytes) == 2 * 2 * 8 * 4  # slots, two layers


def test_linkages_and_groupings_are_told_apart(ran):
    """Catches arms that all run with the first one's grouping."""
    damages = [ran.damage(arm.name) for arm in ran.result.arms[1:]]
    assert len({round(damage, 6) for damage in damages}) >= 6 and min(damages) > 0


def test_every_expert_says_what_it_merged_with(ran):
    """Catches a ledger without the lineage of merged experts."""
    history = ran.ledger.history("average linkage, 1/2")
    assert len(history) == 2 * 8
    into = [steps for steps in history.values() if "merged into" in steps[0]]
    assert len(into) == 2 * 4

"""GKD (arXiv:2306.13649) on nano: own texts and divergences."""

import pytest

from tests.systems.running import NANO, RECOVERY, run_system

pytestmark = pytest.mark.slow


def test_every_divergence_brings_the_student_nearer(tmp_path):
    """Catches a divergence whose sign is wrong, and own texts that nothing is learnt from."""
    overrides = [*NANO, *RECOVERY, "steps = 20", "groups = 4"]
    ran = run_system("distillation/gkd", tmp_path, overrides)
    base = ran.result.arm("merged, 1/2").average.kl
    for arm in ran.result.arms[2:]:
        assert arm.average.kl < base, arm.name

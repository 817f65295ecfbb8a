"""MoE-KD (MSR-TR-2022-6) on nano: the most used experts, distilled layer by layer."""

import pytest

from tests.systems.running import NANO, RECOVERY, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    overrides = [*NANO, *RECOVERY, "steps = 30"]
    return run_system("distillation/moe_kd", tmp_path_factory.mktemp("moe_kd"), overrides)


def test_students_start_from_other_experts(ran):
    """Catches the same expert taken whatever the score."""
    assert ran.damage("most used experts") != ran.damage("least used experts")


def test_every_training_helps(ran):
    """Catches a layers' term that pulls the student away from the text."""
    for name in ("distilled by layers", "distilled by logits", "trained without a teacher"):
        assert ran.damage(name) < 0.8 * ran.damage("most used experts")

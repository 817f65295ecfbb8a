"""OneS (arXiv:2201.10890) on nano: gatherings before and after distillation."""

import pytest

from tests.systems.running import NANO, RECOVERY, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    overrides = [*NANO, *RECOVERY, "steps = 30", "SingularVectors.scale = 0.125"]
    return run_system("distillation/ones", tmp_path_factory.mktemp("ones"), overrides)


def test_students_are_dense(ran):
    """Catches experts that stay in the file."""
    for arm in ran.result.arms[1:]:
        assert arm.expert_bytes == 0


def test_distillation_helps_every_gathering(ran):
    """Catches a student that is not the one that was gathered."""
    for name in ("sum", "mean", "Top-K", "SVD", "most used expert"):
        assert ran.damage(f"{name}, distilled") < ran.damage(name)

"""Switch's distillation (arXiv:2101.03961) on nano: dense feed-forwards drawn anew."""

import pytest

from tests.systems.running import NANO, RECOVERY, run_system

pytestmark = pytest.mark.slow


def test_text_and_teacher_both_count(tmp_path):
    """Catches a term that is left out, so that two arms train alike, and experts that stay."""
    overrides = [*NANO, *RECOVERY, "steps = 40"]
    ran = run_system("distillation/switch_distill", tmp_path, overrides)
    damages = [ran.damage(name) for name in ("text and teacher", "teacher alone", "text alone")]
    assert len(set(damages)) == 3
    assert all(arm.expert_bytes == 0 for arm in ran.result.arms[1:])

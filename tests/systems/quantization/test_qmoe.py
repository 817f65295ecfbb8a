"""QMoE (arXiv:2310.16795) on the nano model: GPTQ against rounding, and what the code takes."""

import math

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=8192",
    "calibration/Text.skip_bytes=16384",
    "calibration/Text.bytes_per_group=32768",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/qmoe", tmp_path_factory.mktemp("qmoe"), NANO)


def test_gptq_is_worth_a_lot(ran):
    """Catches GPTQ that does not hand errors on at three levels."""
    assert ran.damage("QMoE") < 0.8 * ran.damage("ternary, round-to-nearest")


def test_the_code_loses_nothing(ran):
    """Catches codewords that decode to other weights. Of 64 inputs the largest weight is 2.4
    standard deviations, so that only three quarters of the codes are zero and the code saves
    little; tests/weights/test_dictionary.py counts bits at the paper's share of zeros."""
    packed, coded = (ran.result.arm(n) for n in ("ternary by GPTQ, 2 bits stored", "QMoE"))
    assert math.isclose(coded.average.delta_nll, packed.average.delta_nll, abs_tol=1e-5)
    assert coded.expert_bytes < packed.expert_bytes

"""QMoE (arXiv:2310.16795) on the nano model: GPTQ against rounding, and what the code takes."""

import math

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow
NANO = (
    "SavedModel.path='nano'",
    "Text.bytes_per_group=16384",
    "calibration/Text.skip_bytes=16384",
    "calibration/Text.bytes_per_group=65536",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/qmoe", tmp_path_factory.mktemp("qmoe"), NANO)


def test_gptq_is_worth_a_lot(ran):
    """Catches GPTQ that does not hand errors on at three levels."""
    assert ran.damage("QMoE") < 0.8 * ran.damage("ternary, round-to-nearest")


def test_the_code_loses_nothing_and_saves_half(ran):
    """Catches codewords that decode to other weights, and bytes that are not stored: experts of 64
    inputs end codewords early, larger ones do with less (tests/weights/test_dictionary.py)."""
    packed, coded = (ran.result.arm(n) for n in ("ternary by GPTQ, 2 bits stored", "QMoE"))
    assert math.isclose(coded.average.delta_nll, packed.average.delta_nll, abs_tol=1e-5)
    weights = 2 * 8 * 3 * 64 * 64
    codes = 8 * (coded.expert_bytes - 2 * 8 * 3 * 64 * 4) / weights
    assert codes < 1.2
    assert coded.expert_bytes < 0.7 * packed.expert_bytes

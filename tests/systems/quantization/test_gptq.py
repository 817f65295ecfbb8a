"""GPTQ on experts (arXiv:2210.17323) of the reference model."""

import numpy as np
import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/gptq", tmp_path_factory.mktemp("gptq"))


@pytest.mark.parametrize(("bits", "share"), [(3, 0.85), (2, 0.75)])
def test_it_loses_less_than_round_to_nearest(ran, bits, share):
    """Catches error feedback that is scaled wrongly, or that stops at the edge of a block."""
    assert ran.damage(f"GPTQ, {bits} bits") <= share * ran.damage(f"round-to-nearest, {bits} bits")


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_it_lowers_the_output_error_of_nearly_all_matrices(ran, bits):
    """Catches an expert that gets the moments of another one."""
    rows = [row for row in ran.ledger.last(f"GPTQ, {bits} bits").values() if row.calibrated]
    assert len(rows) > 100
    assert np.mean([row.output_error < row.nearest_error for row in rows]) >= 0.95


def test_it_costs_no_byte_more(ran):
    """Catches an index of the activation order that is stored but not counted."""
    sizes = {ran.result.arm(a).stored_bytes for a in ran.starting("GPTQ, 2 bits")}
    assert sizes == {ran.result.arm("round-to-nearest, 2 bits").stored_bytes}

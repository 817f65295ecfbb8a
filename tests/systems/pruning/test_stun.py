"""STUN (arXiv:2409.06211) on nano: experts first, then weights."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("pruning/stun", tmp_path_factory.mktemp("stun"), NANO)


def test_as_many_weights_are_left_as_without_experts_dropped(ran):
    """Catches a comparison of unequal sparsity: 3/4 of 60 % are 45 %."""
    base = ran.result.arm("reference").expert_bytes
    stun, owl = ran.result.arm("STUN").expert_bytes, ran.result.arm("OWL, 55 %").expert_bytes
    # A mask is a sixteenth of what it masks, and nano's thresholds may leave an expert more.
    assert stun / base == pytest.approx(0.75 * (0.6 + 1 / 16), abs=0.05)
    assert owl / base == pytest.approx(0.45 + 1 / 16, abs=0.01)


def test_the_number_of_experts_is_the_one_wanted(ran):
    """Catches a threshold that is not searched for."""
    rows = [r for r in ran.ledger.last("clusters alone, 25 %").values() if "up" in r.matrix]
    assert sum(not row.dropped for row in rows) in (12, 13)


def test_owl_spreads_what_goes_over_layers(ran):
    """Catches layers that all lose the same."""
    rows = ran.ledger.last("OWL, 55 %").values()
    sizes = {row.layer: row.stored_bytes for row in rows if row.matrix.endswith("up")}
    assert len(set(sizes.values())) == 2

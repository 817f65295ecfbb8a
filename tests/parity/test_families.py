"""Every imported family computes what transformers computes, and goes back as it came."""

import numpy as np
import pytest

from tests.parity import harness
from tests.parity.cases import CASES
from tests.parity.harness import BOUND, LEAST_SHARE, VISIBLE, error, pair

pytestmark = pytest.mark.parity

SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]
each = pytest.mark.parametrize("case", CASES, ids=str)
seeded = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(autouse=True)
def _libraries():
    harness.require_transformers()


@each
@seeded
def test_prefill_gives_the_same_logits(case, seed):
    """Catches a wrong name map, a matrix not transposed, gates normalised wrongly, wrong rope."""
    both = pair(case, seed)
    assert error(harness.prefill(both.model, both.tokens), both.expected) <= BOUND


@each
@seeded
def test_decoding_step_by_step_gives_the_same_logits(case, seed):
    """Catches a cache that stores keys unrotated, wrong positions, a state that loses tokens."""
    both = pair(case, seed)
    assert error(harness.decode(both.model, both.tokens), both.expected) <= BOUND


@each
@seeded
def test_faults_in_the_experts_would_show(case, seed):
    """Catches a parity test that sees nothing: experts so quiet that any router passes."""
    both = pair(case, seed)
    if not both.model.spec.moe_layers:
        pytest.skip("a dense model")
    shares = harness.routed_shares(both.model, both.tokens)
    assert min(shares) >= LEAST_SHARE, shares
    swapped = harness.with_experts_swapped(both.model, both.tokens)
    assert error(harness.prefill(swapped, both.tokens), both.expected) >= VISIBLE * BOUND
    raw = harness.without_renormalisation(both.model)
    if raw is not None:
        assert error(harness.prefill(raw, both.tokens), both.expected) >= VISIBLE * BOUND


@each
@seeded
def test_transformers_loads_the_export(case, seed, tmp_path):
    """Catches an export that transposes twice, forgets a tensor, or writes another config."""
    both = pair(case, seed)
    again = harness.exported_logits(both, tmp_path / "out")
    assert error(again, both.expected) <= BOUND
    assert np.isfinite(again).all()

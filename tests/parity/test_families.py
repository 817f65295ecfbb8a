"""Every imported family computes what transformers computes, and goes back as it came."""

import numpy as np
import pytest

from tests.parity import harness
from tests.parity.cases import DENSE, ROUTED
from tests.parity.harness import BOUND, LEAST_SHARE, VISIBLE, error, pair

pytestmark = pytest.mark.parity

SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


MAIN = {"mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama"}


def cases(chosen):
    """One worker has all tests of a case, which share its models and compiled programs.

    Those that are not MAIN are slow: what sets them apart, block tests see by default.
    """

    def marks(case):
        group = pytest.mark.xdist_group(str(case))
        return (group,) if str(case) in MAIN else (group, pytest.mark.slow)

    marked = [pytest.param(case, marks=marks(case)) for case in chosen]
    return pytest.mark.parametrize("case", marked, ids=[str(case) for case in chosen])


each, routed = cases((*ROUTED, *DENSE)), cases(ROUTED)
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


@routed
@seeded
def test_faults_in_the_experts_would_show(case, seed):
    """Catches a parity test that sees nothing: experts so quiet that any router passes."""
    both = pair(case, seed)
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


@pytest.mark.parametrize(
    "name",
    [  # lists per layer in the config; a count of experts with two names; experts in one tensor
        "qwen2_moe",
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_the_export_of_a_pruned_model(name, tmp_path):
    """Catches fields of the original config that the edited model contradicts: layer_types."""
    (case,) = (case for case in ROUTED if str(case) == name)
    both = pair(case, 0)
    edited = harness.pruned(both.model)
    again = harness.exported_logits(both, tmp_path / "out", edited)
    assert error(harness.prefill(edited, both.tokens), again) <= BOUND

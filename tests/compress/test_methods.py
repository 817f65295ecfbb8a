"""GPTQ as a method of passes: whose statistics it reads, and what it does where they do not do."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.calibrate import AllTokens, ExpertCounts, GateWeighted, Routed, SecondMoments
from moejax.compress import GPTQ, Quantize, RoundToNearest, check_recipe
from moejax.compress.methods import MatrixInputs
from moejax.core import MoejaxError, SpecError
from moejax.models import parameters
from moejax.weights import AsymmetricGrid
from tests.compress.conftest import EXPERTS, LAYERS, assert_same_weights, leaves

GRID = AsymmetricGrid(bits=2, group=16)
NEAREST = Quantize(grid=GRID)
TRUSTING = Quantize(grid=GRID, method=GPTQ(least_tokens=0.0))


def energy(d_KxN, moments_KxK):
    return np.sqrt(np.einsum("kn,kj,jn->", d_KxN, moments_KxK, d_KxN))


def test_errors_are_those_of_the_outputs_on_calibration_rows(model, applied, source):
    """Catches moments of another matrix or expert, and an error of weights under another name."""
    after, ledger = applied(TRUSTING)
    nearest, _ = applied(NEAREST)
    need = tuple(SecondMoments(tap=tap) for tap in ("expert_input", "expert_hidden"))
    found = source(model, (*need, ExpertCounts()))
    before, now, rounded = parameters(model), parameters(after), parameters(nearest)
    seen = 0
    for row in ledger:
        name = f"layers.{row.layer}.{row.matrix}"
        moments = found.of(row.layer, need[1] if row.matrix.endswith("down") else need[0])
        H = np.asarray(moments[row.expert], np.float64)
        w, q, r = (
            np.asarray(weights.materialize(named[name])[row.expert], np.float64)
            for named in (before, now, rounded)
        )
        if row.tokens:
            seen += 1
            assert row.output_error == pytest.approx(energy(q - w, H) / energy(w, H), rel=1e-3)
            assert row.nearest_error == pytest.approx(energy(r - w, H) / energy(w, H), rel=1e-3)
    assert seen > LAYERS * EXPERTS


def test_gptq_lowers_the_output_error(applied):
    """Catches GPTQ in the wrong direction, or on the transposed matrix."""
    _, ledger = applied(TRUSTING)
    rows = [row for row in ledger if row.tokens]
    assert np.mean([row.output_error <= row.nearest_error for row in rows]) >= 0.95
    assert np.mean([row.output_error / row.nearest_error for row in rows]) < 0.9


def test_experts_with_few_tokens_are_rounded_to_nearest(applied, model):
    """Catches moments of three tokens that decide 32 inputs, and a fallback that nobody counts."""
    after, ledger = applied(Quantize(grid=GRID, method=GPTQ(least_tokens=1.0)))
    nearest, _ = applied(NEAREST)
    few = {(row.layer, row.expert) for row in ledger if row.tokens < 32}
    assert 0 < len(few) < LAYERS * EXPERTS
    for row in ledger:
        name = f"layers.{row.layer}.{row.matrix}"
        same = np.array_equal(
            weights.materialize(parameters(after)[name])[row.expert],
            weights.materialize(parameters(nearest)[name])[row.expert],
        )
        assert same == ((row.layer, row.expert) in few)
        assert (row.fallback is not None) == same
        assert row.calibrated != same


def test_a_demand_that_no_expert_meets_is_round_to_nearest(applied):
    """Catches a fallback that differs from the method that it names."""
    strict, _ = applied(Quantize(grid=GRID, method=GPTQ(least_tokens=1e9)))
    nearest, _ = applied(NEAREST)
    assert_same_weights(strict, nearest)


@pytest.mark.parametrize("rows", [GateWeighted(), AllTokens()])
def test_rows_decide_the_result(applied, rows):
    """Catches a choice of rows that nothing reads."""
    plain, _ = applied(TRUSTING)
    other, ledger = applied(Quantize(grid=GRID, method=GPTQ(least_tokens=0.0, rows=rows)))
    a, b = leaves(plain), leaves(other)
    assert any(not np.array_equal(a[name], b[name]) for name in a)
    assert all(row.calibrated for row in ledger if row.tokens)


def test_matrices_outside_experts_have_inputs_too(applied):
    """Catches attention quantized on the inputs of the feed-forward."""
    step = Quantize(grid=GRID, method=GPTQ(), parameters="layers.*.attention.?")
    _, ledger = applied(step)
    assert len(ledger) == 4 * LAYERS
    assert all(row.output_error < row.nearest_error for row in ledger)
    assert all(row.fallback is None and row.calibrated for row in ledger)


def test_what_cannot_be_calibrated_is_refused(model):
    """Catches moments of nothing, and NaN that a factorisation hides."""
    with pytest.raises(SpecError, match="no inputs of embed"):
        check_recipe([Quantize(grid=GRID, method=GPTQ(), parameters="embed")], model)
    broken = MatrixInputs(np.full((2, 32, 32), np.nan, np.float32), np.array([64, 64]))
    with pytest.raises(MoejaxError, match="not finite"):
        GPTQ()(jnp.ones((2, 32, 8)), GRID, broken, "layers.0.moe.experts.up")


def test_methods_share_their_interface():
    """Catches a method that a config cannot name."""
    assert RoundToNearest().needs("moe.experts.up") == ()
    assert SecondMoments(tap="expert_input", rows=Routed()) in GPTQ().needs("moe.experts.up")

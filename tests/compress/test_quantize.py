"""Quantized matrices against NumPy, and what stays as it was."""

import numpy as np
import pytest

from moejax import weights
from moejax.compress import FullPrecision, Quantize, check_recipe
from moejax.core import SpecError
from moejax.models import abstract_model, parameters
from moejax.weights import SymmetricGrid
from tests.compress.conftest import (
    EXPERTS,
    FOUR_BITS,
    LAYERS,
    MATRICES,
    apply,
    assert_same_weights,
    leaves,
    logits,
)
from tests.evaluate.conftest import make_spec

GRID = FOUR_BITS.grid


def test_every_expert_weight_goes_to_its_nearest_step(model, applied):
    """Catches one scale per tensor, scales along the wrong axis, and errors of another matrix."""
    after, ledger = applied(FOUR_BITS)
    errors = {(r.layer, r.matrix, r.expert): r.relative_error for r in ledger}
    before, now = parameters(model), parameters(after)
    for layer in range(LAYERS):
        for matrix in ("gate", "up", "down"):
            name = f"layers.{layer}.moe.experts.{matrix}"
            w_ExKxN = np.asarray(before[name], np.float64)
            q_ExKxN = np.asarray(weights.materialize(now[name]), np.float64)
            step_Ex1xN = np.abs(w_ExKxN).max(1, keepdims=True) / 7
            # A stored scale is a float16, so a step may be wider by one part in 2^11.
            assert np.all(np.abs(w_ExKxN - q_ExKxN) <= step_Ex1xN * 0.5003)
            for e in range(EXPERTS):
                error = np.linalg.norm(w_ExKxN[e] - q_ExKxN[e]) / np.linalg.norm(w_ExKxN[e])
                found = errors[layer, f"moe.experts.{matrix}", e]
                assert found == pytest.approx(error, rel=1e-4)
                assert 0.02 < found < 0.2


def test_only_experts_change(model, applied):
    """Catches a default glob that takes routers, norms, attention or embeddings along."""
    after, _ = applied(FOUR_BITS)
    before, now = leaves(model), leaves(after)
    same = {name for name, value in before.items() if np.array_equal(now.get(name), value)}
    assert {name for name in before if ".moe.experts." not in name} == same
    assert all(isinstance(w, weights.Packed) for n, w in parameters(after).items() if n not in same)


def test_more_bits_err_less(applied):
    """Catches a grid that nothing reads."""
    means = []
    for bits in (2, 4):
        _, ledger = applied(Quantize(grid=SymmetricGrid(bits=bits, group=None)))
        assert {row.code_bits for row in ledger} == {bits}
        means.append(np.mean([row.relative_error for row in ledger]))
    assert means[0] > 4 * means[1] > 0


def test_at_full_precision_nothing_changes(model, applied, text):
    """Catches a pass that casts, reorders or regroups what it should leave alone."""
    after, ledger = applied(Quantize(grid=FullPrecision()))
    np.testing.assert_array_equal(logits(after, text), logits(model, text))
    assert_same_weights(after, model)
    assert len(ledger) == LAYERS * EXPERTS * MATRICES
    assert all(r.relative_error == 0 and r.code_bits == 16 for r in ledger)


def test_a_star_does_not_mean_what_is_guarded(applied):
    """Catches `*` that quantizes routers, embeddings or norms."""
    after, ledger = applied(Quantize(grid=GRID, parameters="*"))
    changed = {name for name, w in parameters(after).items() if isinstance(w, weights.Packed)}
    parts = ("attention.k", "attention.o", "attention.q", "attention.v")
    experts = ("moe.experts.down", "moe.experts.gate", "moe.experts.up")
    wanted = {f"layers.{i}.{part}" for i in range(LAYERS) for part in (*parts, *experts)}
    assert changed == wanted
    assert {r.expert for r in ledger if r.matrix.startswith("attention")} == {None}
    assert {r.tokens for r in ledger if r.expert is None} == {75}


def test_what_is_named_outside_of_experts_is_quantized(model, applied, text):
    """Catches weights outside the layers that are matched and then forgotten."""
    after, ledger = applied(Quantize(grid=GRID, parameters="embed"))
    assert isinstance(parameters(after)["embed"], weights.Packed)
    assert [(r.layer, r.expert, r.matrix) for r in ledger] == [(-1, None, "embed")]
    assert np.abs(logits(after, text) - logits(model, text)).max() > 0.01
    after, _ = applied(Quantize(grid=GRID, parameters="layers.1.moe.router*"))
    named = parameters(after)
    assert isinstance(named["layers.1.moe.router.scores.kernel"], weights.Packed)
    assert not isinstance(named["layers.0.moe.router.scores.kernel"], weights.Packed)


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        ("layers.*.moe.expert.*", "layers.0.moe.experts"),
        ("layers.*.mo.experts.up", "layers.0.moe.experts.up"),
        ("*norm*", "a vector of shape [32]"),
        ("layers.7.*", "names no parameter"),
        ("layers.*.scores.kernel", "must be spelled out"),
    ],
)
def test_a_glob_that_is_wrong_is_refused_before_any_work(model, source, glob, wanted):
    """Catches a typing error that leaves a model as it is, or ends a run after its calibration."""
    with pytest.raises(SpecError) as caught:
        apply(model, [FOUR_BITS, Quantize(grid=GRID, parameters=glob)], source)
    assert wanted in str(caught.value)
    assert glob in str(caught.value)
    assert not source.asked


def test_a_grid_that_does_not_fit_is_refused_before_any_work(model):
    """Catches groups that are found not to divide a matrix after the calibration."""
    with pytest.raises(SpecError, match=r"layers\.0\.moe\.experts"):
        check_recipe([Quantize(grid=SymmetricGrid(bits=4, group=24))], model)
    narrow, grid = abstract_model(make_spec(width=24)), SymmetricGrid(bits=3, group=8)
    check_recipe([Quantize(grid=grid, parameters="*.down")], narrow)
    with pytest.raises(SpecError, match=r"layers\.0\.moe\.experts\.gate"):
        check_recipe([Quantize(grid=grid)], narrow)


def test_a_matrix_is_quantized_once(model, source):
    """Catches a second rounding whose error is measured against the first."""
    with pytest.raises(SpecError, match=r"moe\.experts\.\w+ is already stored as Packed"):
        apply(model, [FOUR_BITS, FOUR_BITS], source)
    assert not source.asked

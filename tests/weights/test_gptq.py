"""GPTQ: against the paper's algorithm in float64, and where it must be round-to-nearest."""

from __future__ import annotations

from functools import lru_cache
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError
from moejax.weights import AsymmetricGrid, Grid, bench, gptq, materialize, unpack_codes

_found = util.spec_from_file_location("weights_grids", Path(__file__).with_name("grids.py"))
shared = util.module_from_spec(_found)
_found.loader.exec_module(shared)
E, K, N, GROUP, BITS = 20, 32, 4, 8, 3
COLUMN, GROUPED = AsymmetricGrid(bits=BITS, group=None), AsymmetricGrid(bits=BITS, group=GROUP)
w_ExKxN = shared.drawn(0, (E, K, N), 0.1)


def correlated(seed, experts=E, rows=4 * K, inputs=K):
    """float32 [E, K, K]: moments of rows whose inputs are mixed and of unlike size."""
    draw = np.random.default_rng(seed).standard_normal
    mix = np.eye(inputs) + 0.3 * draw((experts, inputs, inputs))
    x = draw((experts, rows, inputs)) @ mix * np.exp(0.5 * draw((experts, 1, inputs)))
    return np.einsum("erk,erj->ekj", x, x).astype(np.float32)


h_ExKxK = correlated(1)


@lru_cache
def solved(grid, act_order=False, block=32):
    return gptq(jnp.asarray(w_ExKxN), jnp.asarray(h_ExKxK), grid, act_order=act_order, block=block)


def objective(w, weight, h=h_ExKxK):
    d = np.float64(w) - np.float64(materialize(weight))
    return np.einsum("...kn,...kj,...jn->...", d, np.float64(h), d)


def round_column(w, rows, bits=BITS):
    """Scale and zero [N] of the asymmetric grid over rows [group, N]."""
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    scale = np.float64(np.float16((high - low) / (2**bits - 1)))
    return scale, np.round(-low / scale)


def as_in_the_paper(w, h, group, act_order, damping=0.01):
    """float64 codes [K, N] and weights: the inverse, its upper Cholesky factor, row by row."""
    h, original = np.float64(h), np.float64(w)
    h = h + damping * np.mean(np.diag(h)) * np.eye(K)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(K)
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    left = original[order].copy()
    codes, near = np.zeros((K, N)), np.zeros((K, N))
    for i, k in enumerate(order):
        if group is None:
            scale, zero = round_column(w, original)
        elif act_order:
            scale, zero = round_column(w, original[k // group * group :][:group])
        elif i % group == 0:
            scale, zero = round_column(w, left[i : i + group])
        codes[k] = np.clip(np.round(left[i] / scale) + zero, 0, 2**BITS - 1)
        near[k] = (codes[k] - zero) * scale
        error = (left[i] - near[k]) / u[i, i]
        left[i:] -= u[i, i:, None] * error
    return codes, near


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [COLUMN, GROUPED], ids=["column", "grouped"])
def test_is_the_algorithm_of_the_paper(grid, act_order):
    """Catches errors handed to done rows, scales of the wrong weights, and rows left permuted."""
    found = solved(grid, act_order)
    want = [
        as_in_the_paper(w, h, grid.group, act_order) for w, h in zip(w_ExKxN, h_ExKxK, strict=True)
    ]
    codes = np.asarray(unpack_codes(found.weight.words, BITS, K))
    same = codes == np.stack([c for c, _ in want])
    # One weight on a tie goes the other way in float32 and takes the rest of its column along.
    assert same.all((1, 2)).mean() >= 0.8 and same.mean() >= 0.97
    exact = objective(w_ExKxN, np.stack([near for _, near in want]))
    np.testing.assert_allclose(objective(w_ExKxN, found.weight), exact, rtol=0.1)
    assert not np.asarray(found.failed).any()
    np.testing.assert_array_equal(found.damping, np.float32(0.01))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [COLUMN, GROUPED], ids=["column", "grouped"])
def test_lowers_the_error_of_the_outputs(grid, act_order):
    """Catches feedback of the wrong sign: at least 19 of 20 matrices beat round-to-nearest."""
    nearest = objective(w_ExKxN, grid(jnp.asarray(w_ExKxN)))
    assert np.mean(objective(w_ExKxN, solved(grid, act_order).weight) < nearest) >= 0.95


@pytest.mark.parametrize("block", [4, 24, 1])  # 24 is cut to the group, 8
def test_block_does_not_matter(block):
    """Catches errors lost between blocks, and groups that straddle them."""
    for grid in (COLUMN, GROUPED) if block == 4 else (GROUPED,):
        got, want = solved(grid, block=block), solved(grid)
        same = materialize(got.weight) == materialize(want.weight)
        assert same.all((1, 2)).mean() >= 0.8 and same.mean() >= 0.97


UNIT = np.eye(64, dtype=np.float32)
SINGULAR = np.full((64, 64), 2, np.float32)
HOPELESS = UNIT + 1e5 * (1 - UNIT)
DOUBTFUL = UNIT + np.kron(np.eye(32, dtype=np.float32), np.float32([[0, 2.5], [2.5, 0]]))
"""Eigenvalues -1.5 and 3.5: a damping of 0.01, 0.1 or 1 is too little, 10 enough."""
MOMENTS = np.stack([3 * UNIT, 0 * UNIT, HOPELESS, np.diag(np.arange(64.0)), DOUBTFUL, SINGULAR])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", list(shared.GRIDS))
def test_without_correlation_it_is_round_to_nearest(name, act_order):
    """Catches damping that moves weights, inputs of no moment set to zero, scales in other sums.

    Bit for bit: multiples of the identity, no moments, no factor, another diagonal.
    """
    grid: Grid = shared.GRIDS[name]
    w = jnp.asarray(shared.drawn(2, (len(MOMENTS), 64, N), 0.1))
    found = gptq(w, jnp.asarray(MOMENTS, jnp.float32), grid, act_order=act_order, block=8)
    rounded = grid(w)
    assert jax.tree.structure(found.weight) == jax.tree.structure(rounded)
    for got, want in zip(jax.tree.leaves(found.weight), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(got[:4], want[:4])
    assert np.isfinite(materialize(found.weight)).all()
    np.testing.assert_array_equal(found.failed, np.arange(len(MOMENTS)) == 2)
    np.testing.assert_allclose(found.damping, [0.01, 0.01, np.inf, 0.01, 10, 0.01], rtol=1e-6)
    differs = np.asarray(materialize(found.weight) != materialize(rounded)).any((1, 2))
    assert differs[5] or name == "binary"


def test_column_scales_without_correlation():
    """Catches a whole-row scale computed anew in the loop."""
    w = jnp.asarray(w_ExKxN)
    for act_order in (False, True):
        found = gptq(w, 7 * jnp.broadcast_to(jnp.eye(K), (E, K, K)), COLUMN, act_order=act_order)
        leaves = zip(*map(jax.tree.leaves, (found.weight, COLUMN(w))), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves)


def test_batched_equals_one_by_one():
    """Catches scales, damping or orders shared between experts; leading axes of any number."""
    for act_order in (False, True):
        whole = solved(GROUPED, act_order)
        for e in (0, 7):
            one = gptq(
                jnp.asarray(w_ExKxN[e]), jnp.asarray(h_ExKxK[e]), GROUPED, act_order=act_order
            )
            assert one.failed.shape == () and one.weight.shape == (K, N)
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
                np.testing.assert_array_equal(a, b[e])
    stack = gptq(w_ExKxN.reshape(4, 5, K, N), h_ExKxK.reshape(4, 5, K, K), GROUPED)
    whole = solved(GROUPED)
    np.testing.assert_array_equal(stack.weight.words.reshape(E, -1, N), whole.weight.words)
    assert stack.damping.shape == (4, 5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 2 * K), power=st.integers(-60, 60))
def test_any_moments(seed, rows, power):
    """Catches NaN at few rows, dependence on the scale of moments, and experts that mix.

    Moments of fewer rows than inputs are singular; some inputs are never seen.
    """
    h = correlated(seed, rows=rows)
    unseen = np.random.default_rng(seed).random((E, K)) < 0.1
    h *= ~(unseen[:, :, None] | unseen[:, None, :])
    w = shared.drawn(seed, (E, K, N), 0.1)
    found = gptq(w, h, GROUPED)
    near = np.asarray(materialize(found.weight))
    assert np.isfinite(near).all() and not np.asarray(found.failed).any()
    nearest = objective(w, GROUPED(jnp.asarray(w)), h).sum()
    assert objective(w, found.weight, h).sum() <= nearest * (1 + 1e-6)
    other = gptq(w[::-1], h[::-1] * np.float32(2.0**power), GROUPED)
    np.testing.assert_array_equal(np.asarray(materialize(other.weight))[::-1], near)


def test_unseen_inputs_are_rounded():
    """Catches weights of unseen inputs set to zero, or changed by the errors of others."""
    h = h_ExKxK.copy()
    h[:, 5], h[:, :, 5] = 0, 0
    found = gptq(w_ExKxN, h, COLUMN)
    rounded = COLUMN(jnp.asarray(w_ExKxN))
    np.testing.assert_array_equal(materialize(found.weight)[:, 5], materialize(rounded)[:, 5])


def test_benchmark_runs(capsys):
    """Catches a benchmark that no longer fits the interface."""
    ratios = bench.main(["--experts", "2", "--widths", "64", "--rounds", "1"])
    assert ratios.keys() == {64} and min(ratios[64].values()) > 0
    assert "ratio" in capsys.readouterr().out


def test_the_peer_of_the_benchmark_is_gptq():
    """Catches a benchmark against something that is fast or slow because it is wrong."""
    w, moments = bench.layer(1, 256)
    grid = AsymmetricGrid(bits=4, group=64)
    want = unpack_codes(gptq(w[0], moments[0], grid).weight.words, 4, 256)
    got = jax.jit(bench.as_in_the_paper, static_argnums=2)(w[0], moments[0], grid)
    assert np.mean(np.asarray(got) == np.asarray(want)) > 0.99


def test_wrong_arguments_name_the_matrix():
    """Catches NaN moments that quantize without a word, and broadcasting of one expert's."""
    for values in (np.nan, np.inf):
        wrong = h_ExKxK.copy()
        wrong[3, 1, 1] = values
        with pytest.raises(SpecError, match="second moment of up is not finite"):
            gptq(w_ExKxN, wrong, GROUPED, name="up")
        broken = w_ExKxN.copy()
        broken[0, 0, 0] = values
        with pytest.raises(SpecError, match="weight of up is not finite"):
            gptq(broken, h_ExKxK, GROUPED, name="up")
    with pytest.raises(SpecError, match="moments of up have shape"):
        gptq(w_ExKxN, h_ExKxK[0], GROUPED, name="up")
    with pytest.raises(SpecError, match="5 does not divide"):
        gptq(w_ExKxN, h_ExKxK, AsymmetricGrid(bits=4, group=5), name="up")
    for field in ({"block": 0}, {"damping": -1.0}):
        with pytest.raises(SpecError, match=next(iter(field))):
            gptq(w_ExKxN, h_ExKxK, GROUPED, **field)

"""HQQ, clipping, signs: against numpy written from the formulas."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.weights import (
    AsymmetricGrid,
    BinaryGrid,
    ClippedGrid,
    HQQGrid,
    Log2Grid,
    TernaryGrid,
    materialize,
)

_found = util.spec_from_file_location("weights_grids", Path(__file__).with_name("grids.py"))
shared = util.module_from_spec(_found)
_found.loader.exec_module(shared)
K, N, GROUP = 64, 6, shared.GROUP


def half_quadratic(w, grid):
    """float64 mean |w - w^| of one group [group], at the start and at the end."""
    top = 2**grid.bits - 1
    scale = np.float64(np.float16((w.max() - w.min()) / top))
    zero, beta, errors, zeros = -w.min() / scale, grid.beta, [], []
    for _ in range(grid.steps):
        zero = np.float64(np.float16(zero))
        codes = np.clip(np.round(w / scale + zero), 0, top)
        error = w - (codes - zero) * scale
        errors.append(np.abs(error).mean())
        zeros.append(zero)
        if len(errors) > 1 and errors[-1] >= min(errors[:-1]):
            break
        size = np.maximum(np.abs(error), 1e-30)
        kept = np.sign(error) * np.maximum(size - size ** (grid.p - 1) / beta, 0)
        zero, beta = np.mean(codes - (w - kept) / scale), beta * grid.kappa
    return errors[0], min(errors)


@pytest.mark.parametrize("magnitude", [0.05, 2.0])
def test_hqq_is_the_half_quadratic_solver(magnitude):
    """Catches a wrong shrinkage, a zero moved the wrong way, the last zero kept, not the best."""
    grid = HQQGrid(bits=2, group=GROUP)
    w = shared.drawn(1, (K, N), magnitude)
    weight = grid(jnp.asarray(w))
    got = np.abs(np.float64(w) - np.float64(materialize(weight)))
    got = shared.groups(got, GROUP).mean(1)
    each = [
        [half_quadratic(np.float64(column), grid) for column in rows.T]
        for rows in shared.groups(w, GROUP)
    ]
    start, want = np.moveaxis(np.asarray(each), -1, 0)
    assert np.all(got <= start * (1 + 1e-3)) and got.mean() < 0.97 * start.mean()
    assert np.mean(np.isclose(got, want, rtol=1e-3)) > 0.9  # an error on a tie may go either way
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=0.01)
    assert weight.zero.dtype == jnp.float16


def test_hqq_shrinks_only_large_errors():
    """Catches p or beta without effect: at p = 1 and beta -> infinity nothing is left to fit."""
    w = jnp.asarray(shared.drawn(2, (K, N)))
    stuck = HQQGrid(bits=2, group=GROUP, p=1.0, beta=1e9).scales(w)[1]
    start = -np.asarray(w).min(0) / np.float64(HQQGrid(bits=2, group=GROUP).scales(w)[0])
    np.testing.assert_allclose(np.float64(stuck), start, rtol=2e-3)
    moved = HQQGrid(bits=2, group=GROUP).scales(w)[1]
    assert np.abs(np.float64(moved) - np.float64(stuck)).max() > 0.01
    for field in ({"p": 0.0}, {"beta": 0.0}, {"kappa": 0.9}, {"steps": 0}):
        with pytest.raises(SpecError, match=next(iter(field))):
            HQQGrid(bits=2, group=GROUP, **field)


def test_hqq_holds_constant_and_narrow_groups():
    """Catches zeros beyond float16 where a group is far from 0 and narrow."""
    w = np.ones((K, 4), np.float32) * [0.75, -3.0, 1.0, 0.0]
    w[:, 2] += np.linspace(0, 1e-4, K)
    near = np.asarray(materialize(HQQGrid(bits=4, group=None)(jnp.asarray(w))))
    np.testing.assert_allclose(near, w, rtol=1e-3)


@pytest.mark.parametrize(
    "inner",
    [AsymmetricGrid(bits=2, group=GROUP), Log2Grid(bits=3, group=GROUP), BinaryGrid(group=GROUP)],
)
def test_clipping_is_never_worse(inner):
    """Catches a search that leaves out the full range, or shares a factor between groups."""
    w = jnp.asarray(shared.drawn(3, (2, K, N)))

    def errors(weight):
        square = np.square(np.float64(w) - np.float64(materialize(weight)))
        return shared.groups(square, GROUP).sum(-2)

    plain, clipped = errors(inner(w)), errors(ClippedGrid(grid=inner)(w))
    assert np.all(clipped <= plain * (1 + 1e-5))
    if isinstance(inner, AsymmetricGrid):
        assert clipped.mean() < 0.9 * plain.mean()
        tried = [
            errors(inner(jnp.asarray(clip_to(np.asarray(w), factor))))
            for factor in (1.0, *ClippedGrid(grid=inner).candidates)
        ]
        assert np.all(clipped <= np.min(tried, axis=0) * (1 + 1e-3))


def clip_to(w, factor):
    rows = shared.groups(w, GROUP)
    low, high = np.minimum(rows.min(-2), 0), np.maximum(rows.max(-2), 0)
    return np.clip(rows, factor * low[..., None, :], factor * high[..., None, :]).reshape(w.shape)


def test_binary_is_sign_times_mean():
    """Catches the largest weight as scale, a zero among the levels, and one scale per matrix."""
    w = shared.drawn(4, (K, N))
    rows = shared.groups(np.float64(w), GROUP)
    want = np.where(rows >= 0, 1, -1) * np.abs(rows).mean(1, keepdims=True)
    got = materialize(BinaryGrid(group=GROUP)(jnp.asarray(w)))
    np.testing.assert_allclose(got, want.reshape(K, N), rtol=1e-3)


def test_ternary_is_the_best_of_all_thresholds():
    """Catches the rule of thumb 0.7 mean|w|, and sums over the smallest weights."""
    w = shared.drawn(5, (K, N))
    got = np.asarray(materialize(TernaryGrid(group=GROUP)(jnp.asarray(w))), np.float64)
    error = shared.groups(np.square(got - w), GROUP).sum(1)
    rows = shared.groups(np.float64(w), GROUP)

    def at(threshold):
        kept = np.abs(rows) >= threshold
        scale = np.where(kept, np.abs(rows), 0).sum(1) / np.maximum(kept.sum(1), 1)
        return np.square(rows - kept * np.sign(rows) * scale[:, None]).sum(1)

    best = np.min([at(np.abs(rows)[:, i : i + 1]) for i in range(GROUP)], axis=0)
    np.testing.assert_allclose(error, best, rtol=2e-3)
    thumb = at(0.7 * np.abs(rows).mean(1, keepdims=True))
    assert np.all(error <= thumb * (1 + 2e-3)) and error.sum() < 0.99 * thumb.sum()

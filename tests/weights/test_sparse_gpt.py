"""SparseGPT and patterns of sparsity against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.weights import NOfM, PerMatrix, PerOutput, materialize, pack_nm, sparse_gpt

E, K, N = 2, 64, 12
PATTERNS = [PerMatrix(sparsity=0.4), PerOutput(sparsity=0.5), NOfM(n=2, m=4), NOfM(n=4, m=8)]


def weight(seed=0):
    return np.random.default_rng(seed).normal(size=(E, K, N)).astype(np.float32)


def moments(seed=1, rows=256, common=1.0):
    """Of correlated inputs: a few directions that all share, and noise."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(E, rows, 8)) @ generator.normal(size=(E, 8, K)) * common
    x = x + generator.normal(size=(E, rows, K))
    return np.einsum("erk,erj->ekj", x, x).astype(np.float32)


def error(w, q, h):
    d = np.asarray(q, np.float64) - w
    return np.einsum("ekn,ekj,ejn->e", d, h, d)


def by_size(w, pattern):
    return materialize(pattern.pack(jnp.asarray(w), pattern.keep(jnp.abs(w))))


def paper(w, h, prune, strip, damping=0.01):
    """Algorithm 1 of arXiv:2301.00774 on one matrix, with its inverse and in float64."""
    w = np.float64(w).copy()
    h = h / np.diag(h).mean() + damping * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    for first in range(0, len(w), strip):
        rows = slice(first, first + strip)
        gone = prune(np.square(w[rows]) / np.square(np.diag(u)[rows])[:, None])
        for j in range(strip):
            k = first + j
            q = np.where(gone[j], 0, w[k])
            lost = (w[k] - q) / u[k, k]
            w[k] = q
            w[k + 1 :] -= np.outer(u[k, k + 1 :], lost)
    return w


def lowest(count, axis):
    def prune(score):
        flat = score.reshape(-1) if axis is None else score
        rank = np.argsort(np.argsort(flat, axis=axis or 0), axis=axis or 0)
        return (rank < count).reshape(score.shape)

    return prune


@pytest.mark.parametrize(
    ("pattern", "prune", "strip"),
    [
        (PerMatrix(sparsity=0.5), lowest(16 * N // 2, None), 16),
        (PerOutput(sparsity=0.25), lowest(4, 0), 16),
        (NOfM(n=2, m=4), lowest(2, 0), 4),
    ],
)
def test_it_is_the_papers_algorithm(pattern, prune, strip):
    """Catches masks chosen on stale weights, a wrong diagonal, errors fed backwards."""
    w, h = weight(), moments()
    found = sparse_gpt(jnp.asarray(w), jnp.asarray(h), pattern, block=16)
    assert not np.asarray(found.failed).any()
    q = np.asarray(materialize(found.weight))
    for e in range(E):
        wanted = paper(w[e], np.float64(h[e]), prune, strip)
        assert np.mean((q[e] == 0) != (wanted == 0)) < 0.01  # float32 may turn near ties
        agree = (q[e] == 0) == (wanted == 0)
        assert np.abs(q[e] - wanted)[agree].mean() < 0.01


@pytest.mark.parametrize("pattern", PATTERNS)
def test_inputs_without_correlation_leave_magnitude_pruning(pattern):
    """Catches weights that stay and are changed all the same, and scores that are no magnitudes."""
    w = jnp.asarray(weight(), jnp.bfloat16).astype(jnp.float32)
    found = sparse_gpt(w, jnp.broadcast_to(jnp.eye(K), (E, K, K)), pattern)
    np.testing.assert_array_equal(materialize(found.weight), by_size(w, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_correlated_inputs_make_it_better_than_magnitude(pattern):
    """Catches feedback of the wrong sign or scale."""
    w, h = weight(), moments()
    q = materialize(sparse_gpt(jnp.asarray(w), jnp.asarray(h), pattern).weight)
    assert np.all(error(w, q, h) < 0.5 * error(w, by_size(w, pattern), h))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_group_keeps_what_the_pattern_says(pattern):
    """Catches thresholds over other groups, and ties that keep one weight too many."""
    w = np.round(weight() * 2) + 0.25  # many equals, none of them zero
    for q in (
        by_size(w, pattern),
        materialize(sparse_gpt(jnp.asarray(w), jnp.asarray(moments()), pattern).weight),
    ):
        kept = np.asarray(q) != 0
        match pattern:
            case NOfM(n=n, m=m):
                assert np.all(kept.reshape(E, K // m, m, N).sum(2) == n)
            case PerOutput(sparsity=share):
                assert np.all(kept.sum(1) == K - round(share * K))
            case PerMatrix(sparsity=share):
                assert np.all(kept.sum((1, 2)) == K * N - round(share * K * N))


def test_bytes_of_two_of_four():
    """Catches places that take a byte each: 16 bits a value and 2 bits a place."""
    packed = NOfM().pack(jnp.asarray(weight()), NOfM().keep(jnp.asarray(weight())))
    assert packed.nbytes == E * K * N // 2 * (16 + 2) // 8
    assert packed.bits_per_weight == 9
    half = PerOutput(sparsity=0.5)
    assert half.pack(jnp.asarray(weight()), half.keep(jnp.asarray(weight()))).bits_per_weight == 9


def test_all_of_them_is_exact():
    """Catches a last weight that is lost or moved."""
    w = jnp.asarray(weight(), jnp.bfloat16).astype(jnp.float32)
    for pattern in (NOfM(n=4, m=4), PerMatrix(sparsity=0.0), PerOutput(sparsity=0.0)):
        np.testing.assert_array_equal(by_size(w, pattern), w)


def test_what_cannot_be_pruned_is_refused():
    """Catches groups that run over the end of a matrix, and shares that leave nothing."""
    with pytest.raises(SpecError, match="groups of 24 do not divide the 64 inputs of up"):
        sparse_gpt(jnp.asarray(weight()), jnp.asarray(moments()), NOfM(n=2, m=24), name="up")
    with pytest.raises(SpecError, match=r"moments \(2, 64, 12\)"):
        sparse_gpt(jnp.asarray(weight()), jnp.asarray(weight()), NOfM())
    with pytest.raises(SpecError, match="places of up at 2 bits"):
        pack_nm(jnp.ones((1, 8, 4)), jnp.ones((1, 8, 4), bool), 2, 4, "up")
    for wrong in (lambda: NOfM(n=5, m=4), lambda: PerMatrix(sparsity=1.0)):
        with pytest.raises(SpecError, match="impossible"):
            wrong()

"""QMoE's dictionary: exact whatever the codes, below one bit where most are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError
from moejax.weights import Ternary, TernaryRows, encode, gptq, materialize
from moejax.weights.dictionary import ENTRIES, LONGEST, codebook

K, N = 64, 8
decoded = jax.jit(lambda coded: coded.ternary_codes())


def ternary(codes):
    level = jnp.ones((*codes.shape[:-2], 1, codes.shape[-1]), jnp.float16)
    return TernaryRows().pack(jnp.asarray(codes, jnp.uint8), level, -level)


def test_the_dictionary_is_made_of_the_likeliest_sequences():
    """Catches entries that cannot be reached letter by letter, pairs without a codeword of their
    own, and sequences of the wrong odds: brute force over all of up to three pairs."""
    table = codebook()
    assert table.length_V.shape == (ENTRIES,) and table.length_V.max() == LONGEST
    assert (table.next_Vx9[ENTRIES] >= 0).all()
    reached = np.sort(table.next_Vx9[table.next_Vx9 >= 0])
    np.testing.assert_array_equal(reached, np.arange(ENTRIES))
    nonzeros = np.add.outer([0, 1, 1], [0, 1, 1]).ravel()

    def cost(words):
        marks = sum(nonzeros[pair] for pair in words)
        return -marks * np.log(0.0575) - (2 * len(words) - marks) * np.log(0.885)

    def find(words):
        at = ENTRIES
        for pair in words:
            at = table.next_Vx9[at, pair] if at >= 0 else -1
        return at

    words = [w for n in (1, 2, 3) for w in np.ndindex(*(9,) * n)]
    inside = np.array([find(w) >= 0 for w in words])
    costs = np.array([cost(w) for w in words])
    assert costs[inside].max() <= costs[~inside].min() + 1e-9 if (~inside).any() else True
    assert find((0,) * LONGEST) >= 0


def test_less_than_a_bit():
    """Catches codewords that are not the longest, and offsets or lengths that are stored: at
    88.5 % zeros 0.74 bits per weight; the entropy is 0.63."""
    inputs, columns = 4096, 32
    codes = np.zeros(inputs * columns, np.uint8)
    marks = round(0.115 * len(codes))
    codes[:marks] = 1 + np.arange(marks) % 2
    codes = np.random.default_rng(0).permutation(codes).reshape(1, inputs, columns)
    coded = encode(ternary(codes))
    np.testing.assert_array_equal(decoded(coded), codes)
    assert 0.63 < coded.code_bits <= 0.74
    assert coded.bits_per_weight <= 0.75


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_codes_come_back(data):
    """Catches codewords that cross channels, the two halves of an entry mixed up, runs that end in
    the middle of a codeword, and a filling that is decoded."""
    kinds = st.sampled_from(["random", "dense", "zeros", "runs", "last"])
    matrices = []
    for kind in data.draw(st.lists(kinds, min_size=2, max_size=2)):
        generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        share = {"random": generator.random(), "dense": 1.0}.get(kind, 0.02)
        codes = np.where(generator.random((K, N)) < share, generator.integers(1, 3, (K, N)), 0)
        if kind == "zeros":
            codes[:] = 0
        if kind == "last":
            codes[:] = 0
            codes[-1] = 2
        if kind == "runs":
            codes = np.repeat(generator.integers(0, 3, (K // 16, N)), 16, axis=0)
        matrices.append(codes)
    codes = np.stack(matrices)
    coded = encode(ternary(codes))
    filling = K // 2 * N - coded.codes.shape[1]  # one shape, one program
    filled = jnp.pad(coded.codes, ((0, 0), (0, filling)), constant_values=ENTRIES - 1)
    again = type(coded)(filled, coded.low, coded.high, K)
    np.testing.assert_array_equal(decoded(again), codes)


def test_matrices_of_unlike_length_lie_in_one_stack():
    """Catches stacks cut to the shortest matrix, and lengths taken from the first."""
    codes = np.zeros((2, 3, K, N), np.uint8)
    codes[1, 2] = 2
    coded = encode(ternary(codes))
    assert coded.shape == (2, 3, K, N)
    np.testing.assert_array_equal(decoded(coded), codes)
    one, other = coded.take(0), encode(ternary(codes[1, :1]))
    joined = type(coded).concatenate([other, one])
    np.testing.assert_array_equal(decoded(joined), np.concatenate([codes[1, :1], codes[0]]))


def test_levels_are_the_extremes_of_each_channel():
    """Catches one level for a matrix, thresholds that are not half of each level, and signs."""
    w = np.random.default_rng(1).standard_normal((2, K, N)).astype(np.float32)
    w[0, :, 0] = np.abs(w[0, :, 0])
    near = np.asarray(materialize(TernaryRows()(jnp.asarray(w))))
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    low, high = (np.float32(np.float16(v))[:, None] for v in (low, high))
    want = np.where(2 * w > high, high, np.where(2 * w < low, low, 0))
    np.testing.assert_array_equal(near, want)
    assert (near[0, :, 0] >= 0).all()


def test_gptq_onto_three_levels_follows_the_moments():
    """Catches a grid whose zero and scale change places, and moments of the wrong side."""
    generator = np.random.default_rng(2)
    w = generator.standard_normal((2, K, N)).astype(np.float32) ** 3
    x = generator.standard_normal((2, 4 * K, K)) @ generator.standard_normal((2, K, K))
    moments = jnp.asarray(x.swapaxes(1, 2) @ x, jnp.float32)
    nearest = TernaryRows()(jnp.asarray(w))
    same = gptq(jnp.asarray(w), jnp.broadcast_to(jnp.eye(K), (2, K, K)), TernaryRows())
    np.testing.assert_array_equal(same.weight.codes, nearest.codes)
    found = gptq(jnp.asarray(w), moments, TernaryRows(), damping=0.1).weight
    assert isinstance(found, Ternary)
    for e in range(2):
        changes = [w[e] - np.asarray(materialize(q)[e]) for q in (found, nearest)]
        by_gptq, rounded = (np.linalg.norm(x[e] @ change) for change in changes)
        assert by_gptq < 0.98 * rounded


def test_an_odd_number_of_inputs_is_refused():
    """Catches a last weight that is dropped."""
    level = jnp.ones((1, 1, 2), jnp.float16)
    odd = Ternary(jnp.zeros((1, 3, 2), jnp.uint32), -level, level)
    assert odd.shape == (1, 48, 2)
    coded = encode(odd)
    with pytest.raises(SpecError, match="inputs = 47"):
        type(coded)(coded.codes, coded.low, coded.high, 47).check()

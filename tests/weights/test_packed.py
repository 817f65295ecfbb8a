"""Bit packing, and the checks of packed weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError
from moejax.weights import SymmetricGrid, grouped_matmul, pack, pack_codes, unpack_codes


def bits_of(words, bits, inputs):
    """The codes read bit by bit, byte lane by byte lane, from the definition of the layout.

    A period is the fewest words in which the bytes of a lane hold whole codes. In each byte lie,
    lowest first, as many whole codes as fit; the bits above them are strung together, byte after
    byte, and hold the codes that remain.
    """
    per_lane, period = next((8 * n // bits, n) for n in range(1, 9) if 8 * n % bits == 0)
    whole, codes = 8 // bits, np.zeros((inputs, words.shape[1]), np.int64)
    for k in range(inputs):
        block, within = divmod(k, 4 * per_lane)
        lane, i = divmod(within, per_lane)
        for j in range(bits):
            if i < whole * period:
                byte, bit = i // whole, i % whole * bits + j
            else:
                spare = 8 - whole * bits
                byte, bit = divmod((i - whole * period) * bits + j, spare)
                bit += whole * bits
            word = words[block * period + byte].astype(np.int64)
            codes[k] |= ((word >> (8 * lane + bit)) & 1) << j
    return codes


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_round_trip_and_layout(bits, seed):
    """Catches codes lost where they cross a word, gaps between codes, and signs extended."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, (64, 3))
    words = pack_codes(jnp.asarray(codes), bits)
    assert words.dtype == jnp.uint32 and words.shape == (64 * bits // 32, 3)
    np.testing.assert_array_equal(bits_of(np.asarray(words), bits, 64), codes)
    np.testing.assert_array_equal(unpack_codes(words, bits, 64), codes)
    if 8 % bits == 0:
        every = np.unpackbits(
            np.asarray(words).view(np.uint8).reshape(-1, 3, 4), -1, bitorder="little"
        )
        stream = every.transpose(1, 0, 2).reshape(3, 64, bits)
        np.testing.assert_array_equal((stream << np.arange(bits)).sum(-1).T, codes)


def test_round_trip_under_jit_with_leading_axes():
    """Catches packing that mixes experts or layers, or looks at values."""
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, 32, 5))
    words = jax.jit(pack_codes, static_argnums=1)(jnp.asarray(codes), 3)
    assert words.shape == (2, 3, 3, 5)
    np.testing.assert_array_equal(bits_of(np.asarray(words[1, 2]), 3, 32), codes[1, 2])
    np.testing.assert_array_equal(unpack_codes(words, 3, 32), codes)


def test_three_bit_codes_take_three_bits():
    """Catches 3-bit values kept in 4-bit or 8-bit containers."""
    w = jax.random.normal(jax.random.key(0), (4, 96, 64))
    weight = SymmetricGrid(bits=3, group=32)(w)
    assert weight.words.nbytes == 4 * 96 * 64 * 3 // 8
    assert weight.nbytes == 4 * 96 * 64 * 3 // 8 + 2 * 4 * 3 * 64
    assert weight.bits_per_weight == 3 + 16 / 32
    assert weight.code_bits == 3


@pytest.mark.parametrize(
    ("inputs", "bits", "group", "scale_shape", "zero", "says"),
    [
        (32, 9, 32, (1, 4), None, "bits = 9"),
        (32, 0, 32, (1, 4), None, "bits = 0"),
        (40, 3, 40, (1, 4), None, "40 inputs"),
        (32, 4, 12, (2, 4), None, "group = 12"),
        (32, 4, 0, (2, 4), None, "group = 0"),
        (32, 4, 16, (4, 4), None, "scale has shape"),
        (32, 4, 16, (2, 4), (1, 4), "zero has shape"),
    ],
)
def test_what_cannot_be_packed_is_refused(inputs, bits, group, scale_shape, zero, says):
    """Catches broadcasting of wrong scales, and widths cut down to whole words."""
    scale = jnp.ones(scale_shape, jnp.float16)
    zero = None if zero is None else jnp.zeros(zero, jnp.uint8)
    with pytest.raises(SpecError, match=says):
        pack(jnp.zeros((inputs, 4), jnp.int32), scale, zero, bits, group)


def test_integer_scales_and_zeros_of_other_dtypes_are_refused():
    """Catches a scale cut to an integer, and int32 zeros that cost four bytes."""
    codes = jnp.zeros((32, 4), jnp.int32)
    with pytest.raises(SpecError, match="scale is int32"):
        pack(codes, jnp.ones((1, 4), jnp.int32), None, 4, 32)
    with pytest.raises(SpecError, match="zero is int32"):
        pack(codes, jnp.ones((1, 4), jnp.float16), jnp.ones((1, 4), jnp.int32), 4, 32)


def test_scale_gets_the_gradient_of_its_group():
    """Catches scales that a learned-step quantizer cannot train."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, (2, 32, 3))
    scale = jnp.asarray(generator.uniform(0.5, 1, (2, 2, 3)), jnp.float32)
    x = jnp.asarray(generator.standard_normal((6, 32)), jnp.float32)
    sizes = jnp.asarray([4, 2])

    def total(scale):
        return grouped_matmul(x, pack(jnp.asarray(codes), scale, None, 4, 16), sizes).sum()

    got = jax.jit(jax.grad(total))(scale)
    for e, rows in enumerate((slice(0, 4), slice(4, 6))):
        reach = np.float64(x)[rows].sum(0)[:, None] * (codes[e] - 8)
        np.testing.assert_allclose(got[e], reach.reshape(2, 16, 3).sum(1), rtol=1e-4, atol=1e-3)


def test_words_and_groups_are_checked_on_shapes():
    """Catches a manifest whose group does not fit its words."""
    good = pack(jnp.zeros((32, 4), jnp.int32), jnp.ones((1, 4), jnp.float16), None, 3, 32)
    with pytest.raises(SpecError, match="no whole codes"):
        type(good)(good.words[:2], good.scale, None, 3, 32).check()
    with pytest.raises(SpecError, match="does not divide"):
        type(good)(good.words, good.scale, None, 3, 5).check()

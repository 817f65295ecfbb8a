"""The portable path of the quantized grouped matmul against its oracle."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moejax_kernels.quantized_grouped_matmul import (
    layout,
    pack_codes,
    quantized_grouped_matmul,
    xla,
)

E, K, N = 3, 64, 40


def weight(bits, groups, zero, seed=0, K=K):
    """(words, scale, zero) of random codes."""
    generator = np.random.default_rng(seed)
    codes = jnp.asarray(generator.integers(0, 2**bits, (E, K, N)))
    scale = jnp.asarray(generator.random((E, groups, N)) + 0.5, jnp.float16)
    zeros = jnp.asarray(generator.integers(0, 2**bits, (E, groups, N)), jnp.uint8)
    return pack_codes(codes, bits), scale, zeros if zero else None


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@partial(jax.jit, static_argnames=("bits", "backend", "activation_bits"))
def product(x, leaves, sizes, offset, addend, bits, backend, activation_bits=None):
    return quantized_grouped_matmul(
        x,
        *leaves,
        sizes,
        bits=bits,
        group_offset=offset,
        addend=addend,
        backend=backend,
        activation_bits=activation_bits,
    )


@pytest.mark.parametrize("rows", [1, 7, 60])  # single rows, blocks of two, tall blocks
@pytest.mark.parametrize("bits, zero", [(8, True), (4, False), (3, True), (1, False)])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_group_sizes(rows, bits, zero, data):
    """Catches planes in another order than x, blocks that spill over, and lost groups."""
    cuts = sorted(data.draw(st.integers(0, rows)) for _ in range(4))
    sizes = jnp.asarray(np.diff([0, *cuts]), jnp.int32)
    offset = jnp.int32(data.draw(st.integers(-1, 3)))
    arguments = (normal(1, rows, K), weight(bits, 2, zero), sizes, offset, None, bits)
    wanted = product(*arguments, "reference")
    np.testing.assert_allclose(product(*arguments, "xla"), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_with_a_low_rank_term_and_its_gradients(bits):
    """Catches a width whose split codes are joined wrongly, or a factor without a gradient."""
    sizes, x = jnp.asarray([9, 0, 14], jnp.int32), normal(1, 25, K)
    leaves = weight(bits, 2, True)
    addend = normal(2, E, K, 5), normal(3, E, 5, N)

    def total(x, scale, addend, backend):
        words, _, zero = leaves
        y = product(x, (words, scale, zero), sizes, 0, addend, bits, backend)
        return jnp.square(y).sum(), y

    scale = leaves[1].astype(jnp.float32)  # float16 gradients of scales would overflow
    value = partial(jax.value_and_grad(total, (0, 1, 2), has_aux=True), x, scale, addend)
    for got, wanted in zip(
        jax.tree.leaves(value("xla")), jax.tree.leaves(value("reference")), strict=True
    ):
        largest = float(jnp.abs(wanted.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.float32(got), np.float32(wanted), rtol=2e-3, atol=2e-3 * largest
        )


@pytest.mark.parametrize("groups", [1, 2, 8, 64])
def test_groups_wider_and_narrower_than_a_tile(groups, monkeypatch):
    """Catches a tile that takes its neighbour's scale, and groups that split a period."""
    leaves, sizes, x = weight(4, groups, True), jnp.asarray([3, 8, 2], jnp.int32), normal(1, 13, K)
    wanted = product(x, leaves, sizes, 0, None, 4, "reference")
    for tile_bytes in (1, 4 * 16 * N, 1 << 20):  # one period, two, all of them
        monkeypatch.setattr(xla, "TILE_BYTES", tile_bytes)
        got = xla.forward(x, xla.Leaves(*leaves, None, None), sizes, 0, bits=4)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


@given(periods=st.integers(1, 4096), columns=st.integers(1, 20000), bits=st.integers(1, 8))
def test_tilings_cover_the_matrix(periods, columns, bits):
    """Catches tiles that leave inputs out, or that cross a group."""
    for groups in (g for g in (1, 2, 7, 32) if periods % g == 0):
        cut = xla.tiling(periods, groups, columns, layout(bits))
        assert cut.tiles * cut.periods == periods and cut.periods == cut.groups * cut.per_group
        assert cut.tiles % groups == 0 or groups % cut.tiles == 0


def test_int8_activations_round_rows():
    """Catches rounding by another step, or of what the low-rank term sees."""
    leaves, sizes, x = weight(4, 2, False), jnp.asarray([3, 8, 2], jnp.int32), normal(1, 13, K)
    addend = normal(2, E, K, 2), normal(3, E, 2, N)
    both = [product(x, leaves, sizes, 0, addend, 4, name, 8) for name in ("xla", "reference")]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-3)


def test_no_decoded_bank_in_the_compiled_program():
    """Catches a program that decodes all experts, or one whole expert beside its planes."""
    wide = 4096
    shapes = [((8, K), "float32"), ((E, K // 8, wide), "uint32"), ((E, 2, wide), "float16")]
    x, words, scale = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    program = jax.jit(partial(quantized_grouped_matmul, bits=4, backend="xla"))
    memory = program.lower(x, words, scale, None, sizes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * K * wide + 2**19


def test_vmap_and_scan():
    """Catches trip counts that a batch of group sizes breaks."""
    leaves, x = weight(3, 2, True), normal(1, 2, 9, K)
    sizes = jnp.asarray([[9, 0, 0], [2, 3, 4]], jnp.int32)

    def one(x, sizes):
        return product(x, leaves, sizes, 0, None, 3, "xla")

    wanted = [product(x[i], leaves, sizes[i], 0, None, 3, "reference") for i in range(2)]
    _, scanned = jax.lax.scan(lambda c, xs: (c, one(*xs)), None, (x, sizes))
    for got in (jax.vmap(one)(x, sizes), scanned):
        np.testing.assert_allclose(got, np.stack(wanted), rtol=1e-4, atol=1e-3)

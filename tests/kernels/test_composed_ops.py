"""Gated, low-rank and packed products for any group sizes, with gradients, under transformations.

One property for the three ops that are more than one matrix per expert: each against its reference,
which is dense and masked, with sizes and offset traced.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moejax_kernels.gated_grouped_matmul import gated_grouped_matmul
from moejax_kernels.lowrank_grouped_matmul import lowrank_grouped_matmul
from moejax_kernels.quantized_grouped_matmul import pack_codes, quantized_grouped_matmul
from moejax_kernels.route import route

from tests.kernels.test_grouped_matmul import buffers

E, R, K, N = 3, 19, 32, 21


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


WORDS = pack_codes(jnp.asarray(np.random.default_rng(9).integers(0, 16, (E, K, N))), 4)


def packed(x, scale, zero, sizes, **options):
    return quantized_grouped_matmul(x, WORDS, scale, zero, sizes, bits=4, **options)


OPS = {
    "gated": (gated_grouped_matmul, (normal(1, E, K, N), normal(2, E, K, N))),
    "low rank": (lowrank_grouped_matmul, (normal(1, E, K, 3), normal(2, E, 3, N))),
    "packed": (packed, (normal(1, E, 2, N), normal(2, E, 2, N))),
}
X = normal(0, R, K)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(name, backend, x, floats, sizes, offset):
    op, _ = OPS[name]

    def loss(x, floats):
        y = op(x, *floats, sizes, group_offset=offset, backend=backend)
        return jnp.square(y).sum(), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, floats)


def close(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        size = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * (1 + size))


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_group_sizes_and_their_gradients(name, data):
    """Catches empty, tiny and lost groups, experts of another device, and gradients of one of an
    op's matrices that see the rows of another group."""
    cuts = sorted(data.draw(st.integers(0, R)) for _ in range(4))
    sizes = jnp.asarray(np.diff([0, *cuts]), jnp.int32)
    offset = jnp.int32(data.draw(st.integers(-1, 3)))
    floats = OPS[name][1]
    both = [value_and_gradients(name, b, X, floats, sizes, offset) for b in ("xla", "reference")]
    close(*both)


@pytest.mark.parametrize("name", OPS)
def test_under_vmap_scan_and_shard_map(name):
    """Catches sizes of one member of a batch used for all, and a weight's gradient that is that of
    one device's rows."""
    op, floats = OPS[name]
    x, sizes = normal(3, 2, R, K), jnp.asarray([[R, 0, 0], [2, 9, 4]], jnp.int32)
    wanted = jnp.stack([op(x[i], *floats, sizes[i], backend="reference") for i in range(2)])
    batched = jax.vmap(lambda x, sizes: op(x, *floats, sizes))(x, sizes)
    _, scanned = jax.lax.scan(lambda c, xs: (c, op(xs[0], *floats, xs[1])), None, (x, sizes))
    close((batched, scanned), (wanted, wanted))

    def of_rows(x, first, second, sizes):
        return op(x[0], first, second, sizes[0])[None]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()
    sharded = jax.shard_map(of_rows, mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=rows)
    gradients = jax.jit(
        jax.grad(lambda x, *floats: jnp.square(sharded(x, *floats, sizes[1:])).sum(), (0, 1, 2))
    )(x[1:], *floats)
    _, (dx, dfloats) = value_and_gradients(name, "reference", x[1], floats, sizes[1], 0)
    close(gradients, (dx[None], *dfloats))


def test_route_under_shard_map():
    """Catches a constant in the sort whose type differs from that of a device's scores."""
    scores = normal(0, 2, 7, 5)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_rows(scores):
        return jax.tree.map(lambda a: a[None], route(scores[0], 2))

    spec = jax.P("data")
    sharded = jax.jit(jax.shard_map(of_rows, mesh=mesh, in_specs=spec, out_specs=spec))
    for got, wanted in zip(
        jax.tree.leaves(sharded(scores[:1])), jax.tree.leaves(route(scores[0], 2)), strict=True
    ):
        np.testing.assert_array_equal(got[0], wanted)


@pytest.mark.parametrize("rows", [4, 300])
@pytest.mark.parametrize("name", ["gated", "low rank"])
def test_a_bfloat16_bank_is_not_upcast_whole(name, rows):
    """Catches a float32 copy of the experts in the compiled program for a CPU."""
    op, floats = OPS[name]
    wide = 64 * K
    shapes = [tuple(wide if size == K else size for size in leaf.shape) for leaf in floats]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, wide), *shapes)]
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    written = buffers(jax.jit(op).lower(*arrays, sizes).compile())
    for shape in shapes:
        assert f"f32[{','.join(map(str, shape))}]" not in written
        assert f"bf16[{','.join(map(str, shape))}]" in written  # the search would find a copy

"""The fused gate-up-activation against its oracle on every backend, with gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from moejax_kernels.gated_grouped_matmul import BACKENDS, gated_grouped_matmul
from moejax_kernels.gated_grouped_matmul import pallas_tpu as fused
from moejax_kernels.grouped_matmul.tiles import Tiles

R, K, N, E = 90, 24, 200, 3
SIZES = jnp.asarray([40, 0, 43], jnp.int32)
USED = 83


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(dtype):
    x = normal(0, R, K, dtype=dtype)
    return x, 0.3 * normal(1, E, K, N, dtype=dtype), 0.3 * normal(2, E, K, N, dtype=dtype)


def oracle(x, gate, up, sizes, offset=0):
    """float64, from the definition, with SiLU."""
    x, gate, up = (np.asarray(a, np.float64) for a in (x, gate, up))
    h, row = np.zeros((len(x), gate.shape[2])), 0
    for group, size in enumerate(np.asarray(sizes)):
        if 0 <= group - offset < len(gate):
            rows = x[row : row + size]
            z = rows @ gate[group - offset]
            h[row : row + size] = z / (1 + np.exp(-z)) * (rows @ up[group - offset])
        row += size
    return h


def loss(x, gate, up, sizes, backend):
    h = gated_grouped_matmul(x, gate, up, sizes, backend=backend)
    return jnp.square(h.astype(jnp.float32)).sum(), h


step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=4)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_backend(backend, dtype):
    """Catches gate and up exchanged, a gradient that forgets the activation, lost rounding."""
    x, gate, up = operands(dtype)
    (_, h), got = step(x, gate, up, SIZES, backend)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.05, "atol": 0.3}
    np.testing.assert_allclose(np.float64(h), oracle(x, gate, up, SIZES), **tolerance)
    assert not np.any(np.float64(h)[USED:])
    _, want = step(*(a.astype(jnp.float32) for a in (x, gate, up)), SIZES, "reference")
    for mine, exact, like in zip(got, want, (x, gate, up), strict=True):
        assert mine.dtype == like.dtype
        scale = float(jnp.abs(exact).max())
        assert float(jnp.abs(mine.astype(jnp.float32) - exact).max()) < tolerance["rtol"] * scale


def test_the_kernel_fuses_both_products():
    """Catches an epilogue on rounded products, and one applied to rows of a neighbouring group."""
    x, gate, up = operands("float32")
    tiles = Tiles(128, 128, (32, 16), 8, 128, 1, 16 << 20)

    @jax.jit
    def call(x, gate, up, sizes, offset):
        return fused.forward(x, gate, up, sizes, offset, jax.nn.silu, tiles=tiles)

    with pltpu.force_tpu_interpret_mode():
        for sizes, offset in (([40, 0, 43], 0), ([5, 4, 3], 1), ([0, 0, 0], 0)):
            h = call(x, gate, up, jnp.asarray(sizes, jnp.int32), jnp.int32(offset))
            exact = oracle(x, gate, up, sizes, offset)
            np.testing.assert_allclose(h, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_one_kernel_where_nothing_is_differentiated(backward):
    """Catches a TPU program that computes the products twice, or a CPU program with a kernel."""

    def f(x, gate, up, sizes):
        return gated_grouped_matmul(x, gate, up, sizes).astype(jnp.float32).sum()

    f = jax.grad(f, (0, 1, 2)) if backward else f
    w = ((4, 256, 384), "bfloat16")
    shapes = [((512, 256), "bfloat16"), w, w, ((4,), "int32")]
    traced = jax.jit(f).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    # Differentiated: the product, dx and dw, each a function that is called for gate and for up.
    assert on_tpu.count("tpu_custom_call") == (3 if backward else 1)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_wrong_calls_say_what_is_wrong():
    """Catches shapes that broadcast into a wrong answer."""
    x, gate, up = operands("float32")
    with pytest.raises(ValueError, match="alike"):
        gated_grouped_matmul(x, gate, up[:, :, :-1], SIZES)
    with pytest.raises(ValueError, match="K"):
        gated_grouped_matmul(x[:, 1:], gate, up, SIZES)
    with pytest.raises(ValueError, match="unknown"):
        gated_grouped_matmul(x, gate, up, SIZES, backend="fast")

"""The packed decode kernel for NVIDIA cards, interpreted, against codes unpacked by definition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moejax_kernels.grouped_matmul import reference
from moejax_kernels.quantized_grouped_matmul import pallas_triton, quantized_grouped_matmul
from moejax_kernels.shapes import DEEPSEEK, OLMOE

R, K, N, E, GROUPS = 20, 512, 72, 3, 2


def packed(bits, zero, seed=0):
    """words, scale, zero and the weights that they mean; N is no multiple of a tile."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (E, K, N))
    scale = random.uniform(0.5, 1.5, (E, GROUPS, N)).astype(np.float32) / 2**bits
    zeros = {
        "none": np.full((E, GROUPS, N), 2.0 ** (bits - 1)),
        "integer": random.integers(0, 1 << bits, (E, GROUPS, N)).astype(np.uint8),
        "float": random.uniform(0, 1 << bits, (E, GROUPS, N)).astype(np.float32),
    }[zero]
    per_word = 32 // bits
    shifts = bits * np.arange(per_word, dtype=np.uint64)[:, None]
    words = (codes.reshape(E, -1, per_word, N).astype(np.uint64) << shifts).sum(2)
    every = (np.repeat(a.astype(np.float64), K // GROUPS, 1) for a in (scale, zeros))
    repeated_scale, repeated_zero = every
    w = (codes - repeated_zero) * repeated_scale
    given = None if zero == "none" else jnp.asarray(zeros)
    return jnp.asarray(words, jnp.uint32), jnp.asarray(scale), given, jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize(
    "bits, zero, dtype",
    [(4, "none", "float32"), (4, "float", "bfloat16"), (8, "integer", "float32")],
)
def test_decode(bits, zero, dtype):
    """Catches codes in the wrong order, a zero that counts once per step and not per group (a group
    takes several steps here), signed shifts of a word's last code, rows of a neighbour."""
    words, scale, zeros, w = packed(bits, zero)
    call = jax.jit(partial(pallas_triton.forward, bits=bits, interpret=True))
    for sizes, offset in (([3, 0, 14], 0), ([0, 19, 1], 0), ([4, 5, 6], 1)):
        sizes, offset = jnp.asarray(sizes, jnp.int32), jnp.int32(offset)
        x = jnp.asarray(np.random.default_rng(1).standard_normal((R, K)), dtype)
        assert pallas_triton.fits(x, words, scale, bits)
        y = call(x, words, scale, zeros, sizes, offset)
        exact = reference.grouped_matmul_of(x.astype(jnp.float32), w, lambda w: w, sizes, offset)
        assert y.dtype == dtype
        bound = {"rtol": 1e-4, "atol": 1e-3} if dtype == "float32" else {"rtol": 0.01, "atol": 0.1}
        np.testing.assert_allclose(np.float64(y), np.float64(exact), **bound)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model", [OLMOE, DEEPSEEK], ids=lambda model: model.name)
def test_real_shapes_lower(model, bits):
    """Catches groups of 128 inputs that the kernel refuses."""
    shape = model.gate(8)
    structs = [
        jax.ShapeDtypeStruct((shape.rows, shape.inputs), "bfloat16"),
        jax.ShapeDtypeStruct((shape.experts, shape.inputs * bits // 32, shape.outputs), "uint32"),
        jax.ShapeDtypeStruct((shape.experts, shape.inputs // 128, shape.outputs), "bfloat16"),
        jax.ShapeDtypeStruct((shape.experts, shape.inputs // 128, shape.outputs), "uint8"),
        jax.ShapeDtypeStruct((shape.experts,), "int32"),
    ]
    assert pallas_triton.fits(*structs[:3], bits)
    traced = jax.jit(partial(pallas_triton.forward, bits=bits)).trace(*structs)
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_op_takes_it_by_name():
    """Catches a kernel that the op cannot reach, and an addend that it drops without a word."""
    words, scale, zeros, _ = packed(4, "float")
    x, sizes = jnp.ones((R, K)), jnp.asarray([3, 0, 14], jnp.int32)
    call = partial(quantized_grouped_matmul, bits=4, backend="pallas_triton")
    lowering = (
        jax.jit(call).trace(x, words, scale, zeros, sizes).lower(lowering_platforms=("cuda",))
    )
    assert "__gpu$xla.gpu.triton" in lowering.as_text()
    addend = (jnp.ones((E, K, 2)), jnp.ones((E, 2, N)))
    for refused in ({"addend": addend}, {"activation_bits": 8}):
        with pytest.raises(ValueError, match="pallas_triton takes"):
            call(x, words, scale, zeros, sizes, **refused)

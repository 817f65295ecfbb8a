"""The oracle: every expert decoded to float32, every row times every expert, masked."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax_kernels.grouped_matmul import reference as dense
from moejax_kernels.quantized_grouped_matmul.layout import unpack_codes

# Largest integer of an activation: one, two or three int8 digits of up to 127.
STEPS = {8: 127, 16: 127 * 257, 24: 127 * 65793}


class Leaves(NamedTuple):
    """The experts' arrays; every leaf has a leading E axis, or is None."""

    words: Array
    scale: Array
    zero: Array | None
    u: Array | None
    v: Array | None


def decode(leaves: Leaves, bits: int) -> Array:
    """float32 [*lead, K, N]: (code - zero) * scale, plus u @ v."""
    w = decode_codes(leaves.words, leaves.scale, leaves.zero, bits)
    if leaves.u is None or leaves.v is None:
        return w
    factors = leaves.u.astype(jnp.float32), leaves.v.astype(jnp.float32)
    return w + jnp.matmul(*factors, precision="highest")


def decode_codes(words: Array, scale: Array, zero: Array | None, bits: int) -> Array:
    """float32 [*lead, K, N]: (code - zero) * scale; zero None is 2**(bits - 1)."""
    codes = unpack_codes(words, bits).astype(jnp.float32)
    *lead, inputs, columns = codes.shape
    groups = scale.shape[-2]
    codes = codes.reshape(*lead, groups, inputs // groups, columns)
    middle = 2.0 ** (bits - 1) if zero is None else zero.astype(jnp.float32)[..., None, :]
    w = (codes - middle) * scale.astype(jnp.float32)[..., None, :]
    return w.reshape(*lead, inputs, columns)


def quantize_rows(x_RxK: Array, activation_bits: int) -> tuple[Array, Array]:
    """(int32 [R, K], float32 [R, 1]): integers and the step of each row, its maximum / STEPS."""
    x = x_RxK.astype(jnp.float32)
    step_Rx1 = jnp.abs(x).max(1, keepdims=True) / STEPS[activation_bits]
    safe = jnp.where(step_Rx1 > 0, step_Rx1, 1)
    return jnp.round(x / safe).astype(jnp.int32), step_Rx1


def forward(
    x_RxK: Array,
    leaves: Leaves,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    bits: int,
    activation_bits: int | None = None,
) -> Array:
    """See `api.quantized_grouped_matmul`; the low-rank part sees the activations unrounded."""

    def product(x: Array, w_ExKxN: Array) -> Array:
        return dense.grouped_matmul_of(x, w_ExKxN, lambda w: w, group_sizes_G, group_offset)

    x = x_RxK.astype(jnp.promote_types(x_RxK.dtype, jnp.float32))
    if activation_bits is None:
        return product(x, decode(leaves, bits)).astype(x_RxK.dtype)
    # Rows beyond the groups may hold NaN; what they become is masked by the product.
    codes, step_Rx1 = quantize_rows(x, activation_bits)
    rounded = codes.astype(jnp.float32) * step_Rx1
    y = product(rounded, decode_codes(leaves.words, leaves.scale, leaves.zero, bits))
    if leaves.u is not None and leaves.v is not None:
        factors = leaves.u.astype(jnp.float32), leaves.v.astype(jnp.float32)
        y = y + product(x, jnp.matmul(*factors, precision="highest"))
    return y.astype(x_RxK.dtype)

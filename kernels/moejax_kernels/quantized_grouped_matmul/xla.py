"""The portable path: the loops of `grouped_matmul` over experts decoded one at a time."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array

from moejax_kernels.grouped_matmul import xla
from moejax_kernels.quantized_grouped_matmul.reference import (
    Leaves,
    decode,
    quantize_rows,
)


def forward(
    x_RxK: Array,
    leaves: Leaves,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    bits: int,
    activation_bits: int | None = None,
    transposed: bool = False,
) -> Array:
    """[R, N] of x [R, K], or, transposed, [R, K] of x [R, N] (the gradient of x)."""
    inputs = leaves.words.shape[1] * 32 // bits
    columns = inputs if transposed else leaves.words.shape[2]

    def product(x: Array, chosen: Leaves, expert) -> Array:
        return xla.forward(
            x, chosen, expert, columns, group_sizes_G, group_offset, transposed=transposed
        )

    if activation_bits is None:
        return product(x_RxK, leaves, partial(decode, bits=bits))
    codes, step_Rx1 = quantize_rows(x_RxK, activation_bits)
    rounded = codes.astype(jnp.float32) * step_Rx1
    y = product(rounded, leaves._replace(u=None, v=None), partial(decode, bits=bits))
    if leaves.u is not None:
        y = y + product(x_RxK.astype(jnp.float32), leaves, _low_rank)
    return y.astype(x_RxK.dtype)


def _low_rank(leaves: Leaves) -> Array:
    assert leaves.u is not None and leaves.v is not None
    return jnp.matmul(leaves.u.astype(jnp.float32), leaves.v.astype(jnp.float32))

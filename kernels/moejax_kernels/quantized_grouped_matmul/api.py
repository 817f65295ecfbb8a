"""The public op: checks shapes, chooses a backend, carries the gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax_kernels.grouped_matmul import xla as dense_xla
from moejax_kernels.platforms import alike
from moejax_kernels.quantized_grouped_matmul import (
    pallas_tpu,
    pallas_triton,
    reference,
    xla,
)
from moejax_kernels.quantized_grouped_matmul.layout import WORD, layout
from moejax_kernels.quantized_grouped_matmul.reference import STEPS, Leaves

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_triton")


def quantized_grouped_matmul(
    x_RxK: Array,
    words: Array,
    scale: Array,
    zero: Array | None,
    group_sizes_G: Array,
    *,
    bits: int,
    group_offset: int | Array = 0,
    addend: tuple[Array, Array] | None = None,
    activation_bits: int | None = None,
    backend: str | None = None,
) -> Array:
    """Rows sorted by group, each times its group's matrix, stored as packed integers.

    y[r] = x[r] @ w[e],  e = group(r) - group_offset
    w[e, k, n] = (code[e, k, n] - zero[e, k // group, n]) * scale[e, k // group, n]
                 + sum_i u[e, k, i] * v[e, i, n]

    x_RxK: rows of group 0 first, then group 1, ...; float, any R.
    words: uint32 [E, K * bits / 32, N], codes as `layout.pack_codes` lays them; bits 1 .. 8.
    scale: float [E, K / group, N]; the group is what divides K so.
    zero: uint8 or float, shaped like scale; None means 2**(bits - 1).
    group_sizes_G: integers, G >= 1 groups; may be traced.
    group_offset: the experts are groups [group_offset, group_offset + E); may be traced.
    addend: (u [E, K, r], v [E, r, N]), floats: a low-rank term (MiLo, arXiv:2504.02658).
    activation_bits: None multiplies x as it is. 8, 16 or 24 round every row of x to integers with
        one step per row (its maximum / 127, / 32639 or / 8355711: one to three int8 digits), so
        that integer matrix units can be used; an element is off by half a step at most, which at
        24 bits is less than float32 sums lose. The low-rank term sees x unrounded. Gradients go
        straight through the rounding.
    backend: None for the platform's best, else one of BACKENDS. "pallas_triton" is for few rows per
        expert on NVIDIA cards: 4 or 8 bits, without addend or activation_bits; it compiles for an
        H100 and has not run on a card, so that None takes portable code there.
    Returns [R, N] in x's dtype, accumulated in float32; rows of groups without an expert here and
    rows beyond sum(group_sizes) are zero. Differentiable in x, scale, a float zero and the addend,
    reverse mode, once; the backward pass decodes the experts again.
    Raises ValueError on shapes that do not fit.
    """
    leaves = Leaves(words, scale, zero, *(addend or (None, None)))
    _check(x_RxK, leaves, group_sizes_G, bits, activation_bits)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend = {backend!r} is unknown; choose None or one of {BACKENDS}.")
    if backend == "pallas_tpu" and not pallas_tpu.fits(x_RxK, leaves, group_sizes_G, bits):
        raise ValueError(
            f"the TPU kernel wants columns in 128s and whole chunks of inputs and groups; words "
            f"{words.shape} of {bits} bits with {scale.shape[1]} groups do not fit; use 'xla'."
        )
    if backend == "pallas_triton" and (
        addend is not None
        or activation_bits is not None
        or not pallas_triton.fits(x_RxK, words, scale, bits)
    ):
        raise ValueError(
            f"pallas_triton takes 4 or 8 bits in groups of at least 16 words, x as it is and no "
            f"addend; got {bits} bits, words {words.shape}, {scale.shape[1]} groups; use 'xla'."
        )
    operands = alike(x_RxK, leaves, group_sizes_G, group_offset)
    return _jitted(backend, bits, activation_bits, *operands)


def _check(x_RxK, leaves: Leaves, group_sizes_G, bits, activation_bits) -> None:
    words, scale, zero, u, v = leaves
    plan = layout(bits)
    if x_RxK.ndim != 2 or group_sizes_G.ndim != 1 or group_sizes_G.shape[0] == 0:
        raise ValueError(
            f"x {x_RxK.shape} must be [R, K] and group_sizes {group_sizes_G.shape} [G], G >= 1."
        )
    if words.ndim != 3 or words.dtype != jnp.uint32 or words.shape[1] % plan.words:
        raise ValueError(
            f"words are {words.dtype}{words.shape}, expected uint32 [E, K*bits/32, N]."
        )
    experts, count, columns = words.shape
    inputs = count * WORD // bits
    if x_RxK.shape[1] != inputs:
        raise ValueError(f"x {x_RxK.shape} and words {words.shape} of {bits} bits disagree on K.")
    if scale.ndim != 3 or (scale.shape[0], scale.shape[2]) != (experts, columns):
        raise ValueError(f"scale has shape {scale.shape}, expected [{experts}, groups, {columns}].")
    if scale.shape[1] == 0 or inputs % scale.shape[1]:
        raise ValueError(f"scale has {scale.shape[1]} groups, which do not divide {inputs} inputs.")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero has shape {zero.shape}, scale {scale.shape}.")
    if u is not None and v is not None:
        rank = u.shape[-1]
        if u.shape != (experts, inputs, rank) or v.shape != (experts, rank, columns):
            raise ValueError(f"addend {u.shape}, {v.shape} is no [E, K, r], [E, r, N].")
    if activation_bits not in (None, *STEPS):
        raise ValueError(f"activation_bits = {activation_bits}; choose None or {tuple(STEPS)}.")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(backend, bits, activation_bits, x_RxK, leaves, group_sizes_G, group_offset):
    # jit keeps eager calls from compiling their loops anew each time.
    if backend == "reference" and activation_bits is None:  # plain autodiff
        return reference.forward(x_RxK, leaves, group_sizes_G, group_offset, bits=bits)
    return _product(backend, bits, activation_bits, x_RxK, leaves, group_sizes_G, group_offset)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(backend, bits, activation_bits, x_RxK, leaves, group_sizes_G, group_offset):
    options = {"bits": bits, "activation_bits": activation_bits}
    portable = partial(xla.forward, **options)
    operands = (x_RxK, leaves, group_sizes_G, group_offset)
    if backend == "reference":
        return reference.forward(*operands, **options)
    if backend == "pallas_tpu":
        return pallas_tpu.forward(*operands, **options)
    if backend == "pallas_triton":
        words, scale, zero = leaves.words, leaves.scale, leaves.zero
        return pallas_triton.forward(
            x_RxK, words, scale, zero, group_sizes_G, group_offset, bits=bits
        )
    if backend == "xla" or not pallas_tpu.fits(x_RxK, leaves, group_sizes_G, bits):
        return portable(*operands)
    # Decided when the program is lowered: a TPU program may be compiled on a machine without one.
    kernel = partial(pallas_tpu.forward, **options)
    return lax.platform_dependent(*operands, tpu=kernel, default=portable)


def _product_forward(backend, bits, activation_bits, x_RxK, leaves, group_sizes_G, group_offset):
    y = _product(backend, bits, activation_bits, x_RxK, leaves, group_sizes_G, group_offset)
    return y, (x_RxK, leaves, group_sizes_G, group_offset)


def _product_backward(backend, bits, activation_bits, saved, dy_RxN):
    x_RxK, leaves, group_sizes_G, group_offset = saved
    dx_RxK = xla.forward(dy_RxN, leaves, group_sizes_G, group_offset, bits=bits, transposed=True)
    expert = partial(reference.decode, bits=bits)
    gradients = dense_xla.leaves_gradient(
        x_RxK, dy_RxN, leaves, expert, group_sizes_G, group_offset
    )
    return dx_RxK.astype(x_RxK.dtype), gradients, None, None


_product.defvjp(_product_forward, _product_backward)

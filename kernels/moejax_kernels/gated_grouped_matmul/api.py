"""The public op: checks shapes, chooses a backend, carries the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from moejax_kernels.gated_grouped_matmul import reference
from moejax_kernels.grouped_matmul import grouped_matmul
from moejax_kernels.platforms import Out, alike, per_platform

Activation = Callable[[Array], Array]
BACKENDS = ("reference", "xla")  # on every platform
KERNELS = ("pallas_tpu",)  # on its own platform, elsewhere in Pallas's interpret mode


def gated_grouped_matmul(
    x_RxK: Array,
    gate_ExKxN: Array,
    up_ExKxN: Array,
    group_sizes_G: Array,
    *,
    activation: Activation = jax.nn.silu,
    group_offset: int | Array = 0,
    backend: str | None = None,
) -> Array:
    """The first half of gated experts (arXiv:2002.05202), rows sorted by group.

    h[r] = activation(x[r] @ gate[e]) * (x[r] @ up[e])  with  e = group(r) - group_offset

    x_RxK, group_sizes_G, group_offset: as in `grouped_matmul`.
    gate_ExKxN, up_ExKxN: of one shape and dtype.
    activation: elementwise, maps 0 to anything; the same object on every call.
    backend: None for the platform's best, chosen when the program is lowered: on TPU a kernel that
        reads x once and keeps both products in VMEM; elsewhere "xla", two grouped matmuls, whose
        products are rounded to x's dtype before they meet. Also "reference" and "pallas_tpu".
    Returns [R, N] in x's dtype; rows of no group are zero. Differentiable in x, gate and up,
    reverse mode, once: a differentiated call keeps both products, as two grouped matmuls do.
    Raises ValueError on shapes that do not fit.
    """
    known = (*BACKENDS, *KERNELS)
    if backend not in (None, *known):
        raise ValueError(f"backend = {backend!r} is unknown; choose None or one of {known}.")
    if gate_ExKxN.shape != up_ExKxN.shape or gate_ExKxN.dtype != up_ExKxN.dtype:
        raise ValueError(
            f"gate {gate_ExKxN.dtype}{gate_ExKxN.shape} and up {up_ExKxN.dtype}{up_ExKxN.shape} "
            "must be alike."
        )
    if x_RxK.ndim != 2 or gate_ExKxN.ndim != 3 or gate_ExKxN.shape[1] != x_RxK.shape[1]:
        raise ValueError(f"x {x_RxK.shape} must be [R, K], and gate {gate_ExKxN.shape} [E, K, N].")
    return _dispatch(backend, activation, x_RxK, gate_ExKxN, up_ExKxN, group_sizes_G, group_offset)


@partial(jax.jit, static_argnums=(0, 1))
def _dispatch(backend, activation, x, gate, up, sizes, offset):
    if backend == "reference":
        return reference.gated_grouped_matmul(x, gate, up, sizes, offset, activation)
    return _gated(backend, activation, *alike(x, gate, up, sizes, offset))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(backend, activation, x, gate, up, sizes, offset):
    def composed(*arrays):
        return [_composed(backend, activation, *arrays)]

    def fused(x, gate, up, sizes, offset):
        from moejax_kernels.gated_grouped_matmul import pallas_tpu

        return [pallas_tpu.forward(x, gate, up, sizes, offset, activation)]

    arrays = (x, gate, up, sizes, offset)
    if backend is None:
        out = Out((x.shape[0], gate.shape[2]), x.dtype)
        (h,) = per_platform(*arrays, out=[out], default=composed, tpu=fused)
    else:
        (h,) = (composed if backend == "xla" else fused)(*arrays)
    return h


def _gated_forward(backend, activation, x, gate, up, sizes, offset):
    def products(x, gate, up):
        return _composed(backend, activation, x, gate, up, sizes, offset)

    return jax.vjp(products, x, gate, up)


def _gated_backward(backend, activation, pull_back, dh):
    return *pull_back(dh), None, None


_gated.defvjp(_gated_forward, _gated_backward)


def _composed(backend, activation, x, gate, up, sizes, offset):
    product = partial(grouped_matmul, x, group_sizes_G=sizes, group_offset=offset, backend=backend)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gate_RxN, up_RxN = product(gate).astype(wide), product(up).astype(wide)
    h_RxN = activation(gate_RxN) * up_RxN
    return h_RxN.astype(x.dtype)

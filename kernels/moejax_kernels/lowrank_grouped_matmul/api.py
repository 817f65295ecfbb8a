"""The public op: two grouped matmuls through the rank, with one rounding at the end.

There is no kernel of its own: each factor is read once by `grouped_matmul`, and what lies between
is [R, r]. A low-rank term beside packed weights is fused where those are multiplied, as the addend
of `quantized_grouped_matmul`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax_kernels.grouped_matmul import grouped_matmul
from moejax_kernels.lowrank_grouped_matmul import reference

BACKENDS = ("reference", "xla")


def lowrank_grouped_matmul(
    x_RxK: Array,
    u_ExKxr: Array,
    v_ExrxN: Array,
    group_sizes_G: Array,
    *,
    group_offset: int | Array = 0,
    backend: str | None = None,
) -> Array:
    """Rows sorted by group, each times its group's matrix u @ v, which is never built.

    y[r] = (x[r] @ u[e]) @ v[e],  e = group(r) - group_offset

    x_RxK, group_sizes_G, group_offset: as in `grouped_matmul`.
    backend: None or "xla" for `grouped_matmul`'s own choice and its loops, else "reference".
    Returns [R, N] in x's dtype; x @ u stays in float32. Rows of groups without an expert here and
    rows beyond sum(group_sizes) are zero. Differentiable in x, u and v, reverse mode, once.
    Raises ValueError on shapes that do not fit.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend = {backend!r} is unknown; choose None or one of {BACKENDS}.")
    u, v = u_ExKxr.shape, v_ExrxN.shape
    if len(u) != 3 or len(v) != 3 or u[0] != v[0] or u[2] != v[1]:
        raise ValueError(f"factors {u} and {v} are no [E, K, r] and [E, r, N].")
    if backend == "reference":
        return reference.forward(x_RxK, u_ExKxr, v_ExrxN, group_sizes_G, group_offset)
    wide = x_RxK.astype(jnp.promote_types(x_RxK.dtype, jnp.float32))
    options = {"group_offset": group_offset, "backend": backend}
    h_Rxr = grouped_matmul(wide, u_ExKxr, group_sizes_G, **options)
    return grouped_matmul(h_Rxr, v_ExrxN, group_sizes_G, **options).astype(x_RxK.dtype)

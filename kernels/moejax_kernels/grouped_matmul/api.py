"""The public op: checks shapes, chooses a backend, carries the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax_kernels.grouped_matmul import reference, xla

BACKENDS = ("reference", "xla", "ragged_dot")


def grouped_matmul(
    x_RxK: Array,
    w_ExKxN: Array,
    group_sizes_G: Array,
    *,
    group_offset: int | Array = 0,
    backend: str | xla.Loops | None = None,
) -> Array:
    """Rows sorted by group, each times its group's matrix.

    y[r] = x[r] @ w[group(r) - group_offset]

    x_RxK: rows of group 0 first, then group 1, ...; float, any R.
    group_sizes_G: integers, G >= 1 groups; may be traced.
    group_offset: w holds groups [group_offset, group_offset + E); may be traced.
    backend: None for the platform's best, else "reference", "xla" or "ragged_dot"; a `Loops` is
        "xla" with a say in how it trades compile time for run time (FAST_COMPILE, FAST_RUN).
    Returns [R, N] in x's dtype, accumulated in float32; rows of groups that w does not hold and
    rows beyond sum(group_sizes) are zero. Differentiable in x and w, reverse mode, once.
    Raises ValueError on shapes that do not fit, or "ragged_dot" with a group offset.
    """
    if w_ExKxN.ndim != 3:
        raise ValueError(f"w has shape {w_ExKxN.shape}, expected [E, K, N].")
    if w_ExKxN.shape[1] != x_RxK.shape[-1]:
        raise ValueError(f"x {x_RxK.shape} and w {w_ExKxN.shape} disagree on K.")
    return grouped_matmul_of(
        x_RxK,
        w_ExKxN,
        _itself,
        group_sizes_G,
        columns=w_ExKxN.shape[2],
        group_offset=group_offset,
        backend=backend,
    )


def grouped_matmul_of(
    x_RxK: Array,
    leaves: Any,
    expert: Callable[[Any], Array],
    group_sizes_G: Array,
    *,
    columns: int,
    group_offset: int | Array = 0,
    backend: str | xla.Loops | None = None,
) -> Array:
    """`grouped_matmul` with experts in any format, decoded one at a time and once per call.

    leaves: pytree, every leaf with a leading E axis.
    expert: leaves of one expert -> [K, columns]; hashable, the same object on every call (a new
        closure compiles anew); it may see bfloat16 leaves as float32.
    Differentiable in x and, through autodiff of `expert`, in the float leaves; the backward pass
    decodes each expert again instead of keeping it.
    """
    if not isinstance(backend, xla.Loops) and backend not in (None, *BACKENDS):
        raise ValueError(f"backend = {backend!r} is unknown; choose None or one of {BACKENDS}.")
    if x_RxK.ndim != 2 or group_sizes_G.ndim != 1 or group_sizes_G.shape[0] == 0:
        raise ValueError(
            f"x {x_RxK.shape} must be [R, K] and group_sizes {group_sizes_G.shape} [G], G >= 1."
        )
    whole = expert is _itself and isinstance(group_offset, int | np.integer) and group_offset == 0
    whole = whole and leaves.shape[0] == group_sizes_G.shape[0]
    if backend == "ragged_dot" and not whole:
        raise ValueError("ragged_dot wants a plain array, E == G and group_offset == 0; use 'xla'.")
    if backend == "xla" or (backend is None and not whole):
        backend = xla.FAST_RUN
    return _dispatch(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset)


def _itself(leaf: Array) -> Array:
    return leaf


@partial(jax.jit, static_argnums=(0, 1, 2))
def _dispatch(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset):
    # jit keeps eager calls from compiling their loops anew each time.
    if backend == "reference":
        return reference.grouped_matmul_of(x_RxK, leaves, expert, group_sizes_G, group_offset)
    x_RxK, leaves, group_sizes_G, group_offset = xla.alike(
        x_RxK, leaves, group_sizes_G, group_offset
    )
    return _loops(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loops(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset):
    def by_loop(x, leaves, sizes):
        return xla.forward(x, leaves, expert, columns, sizes, group_offset)

    return _choose(backend, by_loop, _ragged, x_RxK, leaves, group_sizes_G)


def _loops_forward(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset):
    y_RxN = _loops(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset)
    return y_RxN, (x_RxK, leaves, group_sizes_G, group_offset)


def _loops_backward(backend, expert, columns, saved, dy_RxN):
    x_RxK, leaves, group_sizes_G, group_offset = saved

    def by_loop(x, leaves, sizes, dy):
        width = x.shape[1]
        dx = xla.forward(dy, leaves, expert, width, sizes, group_offset, transposed=True)
        loops = backend if isinstance(backend, xla.Loops) else xla.FAST_RUN
        return dx, xla.leaves_gradient(x, dy, leaves, expert, sizes, group_offset, loops)

    def by_ragged_dot(x, leaves, sizes, dy):
        return jax.vjp(lambda x, w: _ragged(x, w, sizes), x, leaves)[1](dy)

    if isinstance(backend, xla.Loops):
        dx, dleaves = by_loop(x_RxK, leaves, group_sizes_G, dy_RxN)
    else:
        dx, dleaves = _choose(backend, by_loop, by_ragged_dot, x_RxK, leaves, group_sizes_G, dy_RxN)
    return dx, dleaves, None, None


_loops.defvjp(_loops_forward, _loops_backward)


def _choose(backend, by_loop, by_ragged_dot, *arrays):
    """Loops on CPU, where ragged_dot is masked dense (E times the flops); ragged_dot elsewhere."""
    if isinstance(backend, xla.Loops):
        return by_loop(*arrays)
    if backend == "ragged_dot":
        return by_ragged_dot(*arrays)
    # Decided when the program is lowered: a TPU program may be compiled on a machine without one.
    return lax.platform_dependent(*arrays, cpu=by_loop, default=by_ragged_dot)


def _ragged(x_RxK: Array, w_ExKxN: Array, group_sizes_G: Array) -> Array:
    # Rows beyond the groups are undefined on some platforms, and may hold NaN.
    used_Rx1 = (jnp.arange(x_RxK.shape[0]) < group_sizes_G.sum())[:, None]
    x_RxK = jnp.where(used_Rx1, x_RxK, 0)
    common = jnp.promote_types(x_RxK.dtype, w_ExKxN.dtype)
    y_RxN = lax.ragged_dot(
        x_RxK.astype(common),
        w_ExKxN.astype(common),
        group_sizes_G.astype(jnp.int32),
        preferred_element_type=jnp.promote_types(common, jnp.float32),
    )
    return jnp.where(used_Rx1, y_RxN, 0).astype(x_RxK.dtype)

"""The public op: checks shapes, chooses a backend, carries the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax_kernels.grouped_matmul import gpu, reference, xla
from moejax_kernels.platforms import Out, alike, per_platform

BACKENDS = ("reference", "xla", "ragged_dot")  # on every platform
KERNELS = ("pallas_tpu", "pallas_gpu", "pallas_triton")  # elsewhere in Pallas's interpret mode


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
    backend: None for the platform's best, chosen when the program is lowered, else "reference",
        "xla", "ragged_dot", "pallas_tpu" (bfloat16 as it is, other dtypes in float32), "pallas_gpu"
        (Hopper alone: one 16-bit dtype, K and N in multiples of 64) or "pallas_triton" (NVIDIA
        cards from Ampere on: 16-bit and float32). What "pallas_gpu" does not take goes to
        "pallas_triton", and what that does not take to "xla". The GPU kernels have been
        interpreted, and compiled for an H100; they have not yet run on a card, so that None takes
        portable code there. A `Loops` is "xla" with a say in how it trades compile time for run
        time (FAST_COMPILE, FAST_RUN).
    Returns [R, N] in x's dtype, accumulated in float32; rows of groups that w does not hold and
    rows beyond sum(group_sizes) are zero. Differentiable in x and w, reverse mode, once.
    Raises ValueError on shapes that do not fit, and for "ragged_dot" with a group offset.
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
    known = (*BACKENDS, *KERNELS)
    if not isinstance(backend, xla.Loops) and backend not in (None, *known):
        raise ValueError(f"backend = {backend!r} is unknown; choose None or one of {known}.")
    if x_RxK.ndim != 2 or group_sizes_G.ndim != 1 or group_sizes_G.shape[0] == 0:
        raise ValueError(
            f"x {x_RxK.shape} must be [R, K] and group_sizes {group_sizes_G.shape} [G], G >= 1."
        )
    plain = expert is _itself
    whole = plain and isinstance(group_offset, int | np.integer) and group_offset == 0
    whole = whole and leaves.shape[0] == group_sizes_G.shape[0]
    if backend == "ragged_dot" and not whole:
        raise ValueError("ragged_dot wants a plain array, E == G and group_offset == 0; use 'xla'.")
    if backend in KERNELS and not plain:
        raise ValueError(f"{backend} wants a plain array; use 'xla', which decodes other formats.")
    if backend == "xla" or (backend is None and not plain):
        backend = xla.FAST_RUN
    chosen: str | PlatformBest | xla.Loops = backend or PlatformBest(
        # ragged_dot is masked dense on CPU: E times the flops. It is fast on some GPUs.
        tpu="pallas_tpu",
        default="ragged_dot" if whole else "xla",
    )
    return _dispatch(chosen, expert, columns, x_RxK, leaves, group_sizes_G, group_offset)


class PlatformBest(NamedTuple):
    """Backends by platform; on CPU it is "xla"."""

    tpu: str
    default: str


def _itself(leaf: Array) -> Array:
    return leaf


@partial(jax.jit, static_argnums=(0, 1, 2))
def _dispatch(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset):
    # jit keeps eager calls from compiling their loops anew each time.
    if backend == "reference":
        return reference.grouped_matmul_of(x_RxK, leaves, expert, group_sizes_G, group_offset)
    arrays = alike(x_RxK, leaves, group_sizes_G, group_offset)
    return _product(backend, expert, columns, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset):
    def by_loop(x, leaves, sizes, offset):
        return xla.forward(x, leaves, expert, columns, sizes, offset)

    def by_ragged_dot(x, w, sizes, offset):
        return _ragged(x, w, sizes)

    def by_kernel(x, w, sizes, offset):
        from moejax_kernels.grouped_matmul import pallas_tpu

        return pallas_tpu.forward(x, (w,), sizes, offset)

    def by_gpu_kernel(backend, x, w, sizes, offset):
        kernels = gpu.kernels_for(backend, x, w)
        return (kernels.forward if kernels else by_loop)(x, w, sizes, offset)

    ways = {"xla": by_loop, "ragged_dot": by_ragged_dot, "pallas_tpu": by_kernel}
    ways |= {name: partial(by_gpu_kernel, name) for name in ("pallas_gpu", "pallas_triton")}
    out = Out((x_RxK.shape[0], columns), x_RxK.dtype)
    return _choose(backend, ways, out, x_RxK, leaves, group_sizes_G, group_offset)


def _product_forward(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset):
    y_RxN = _product(backend, expert, columns, x_RxK, leaves, group_sizes_G, group_offset)
    return y_RxN, (x_RxK, leaves, group_sizes_G, group_offset)


def _product_backward(backend, expert, columns, saved, dy_RxN):
    x_RxK, leaves, group_sizes_G, group_offset = saved

    def by_loop(x, leaves, sizes, offset, dy):
        dx = xla.forward(dy, leaves, expert, x.shape[1], sizes, offset, transposed=True)
        loops = backend if isinstance(backend, xla.Loops) else xla.FAST_RUN
        return dx, xla.leaves_gradient(x, dy, leaves, expert, sizes, offset, loops)

    def by_ragged_dot(x, w, sizes, offset, dy):
        return jax.vjp(lambda x, w: _ragged(x, w, sizes), x, w)[1](dy)

    def by_kernel(x, w, sizes, offset, dy):
        from moejax_kernels.grouped_matmul import pallas_tpu, pallas_tpu_dw

        dx = pallas_tpu.forward(dy, (w,), sizes, offset, transposed=True)
        dw = pallas_tpu_dw.weight_gradient(x, dy, sizes, offset, experts=w.shape[0], dtype=w.dtype)
        return dx.astype(x.dtype), dw

    def by_gpu_kernel(backend, x, w, sizes, offset, dy):
        kernels = gpu.kernels_for(backend, dy, w)
        if kernels is None:
            return by_loop(x, w, sizes, offset, dy)
        dx = kernels.forward(dy, w, sizes, offset, transposed=True)
        return dx, kernels.weight_gradient(x, dy, sizes, offset, experts=w.shape[0], dtype=w.dtype)

    ways = {"xla": by_loop, "ragged_dot": by_ragged_dot, "pallas_tpu": by_kernel}
    ways |= {name: partial(by_gpu_kernel, name) for name in ("pallas_gpu", "pallas_triton")}
    arrays = (x_RxK, leaves, group_sizes_G, group_offset, dy_RxN)
    out = jax.tree.map(lambda like: Out(like.shape, like.dtype), (x_RxK, leaves))
    dx, dleaves = _choose(backend, ways, out, *arrays)
    return dx, dleaves, None, None


_product.defvjp(_product_forward, _product_backward)


def _choose(backend, ways, out, *arrays):
    """The backend's way with `arrays`; `out` is a pytree of its results' shapes."""
    if not isinstance(backend, PlatformBest):
        return ways["xla" if isinstance(backend, xla.Loops) else backend](*arrays)
    treedef = jax.tree.structure(out, is_leaf=_is_out)

    def flat(way):
        return lambda *arrays: jax.tree.leaves(way(*arrays))

    results = per_platform(
        *arrays,  # formats never come here: a plain array is one leaf
        out=jax.tree.leaves(out, is_leaf=_is_out),
        cpu=flat(ways["xla"]),
        tpu=flat(ways[backend.tpu]),
        default=flat(ways[backend.default]),
    )
    return jax.tree.unflatten(treedef, results)


def _is_out(tree: Any) -> bool:
    return isinstance(tree, Out)


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

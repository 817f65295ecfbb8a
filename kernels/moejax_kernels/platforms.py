"""One function for each platform, of which only the one that a program is lowered for is traced.

`lax.platform_dependent` traces every branch. A TPU kernel takes most of a second to trace, which a
program for a CPU must not pay for, and a TPU program may be compiled on a machine without a TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Out(NamedTuple):
    """Shape and dtype of a result."""

    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike


def per_platform(
    *arrays: Array,
    out: Sequence[Out],
    default: Callable[..., Sequence[Array]],
    **ways: Callable[..., Sequence[Array]],
) -> list[Array]:
    """What the way of the platform makes of `arrays`: arrays of the shapes `out`.

    ways: by platform ("cpu", "tpu", "cuda", "rocm"); `default` for all others. Chosen when the
        program is lowered. Under vmap the way of the CPU runs on every platform: kernels that
        prefetch scalars cannot be mapped.
    arrays: inside shard_map they vary over the same mesh axes (`alike`), and so do the results.
    Not differentiable: put a custom_vjp around it.
    """
    return _per_platform.bind(*arrays, out=tuple(out), ways=(("", default), *ways.items()))


def alike(*operands: Any) -> tuple[Any, ...]:
    """The operands, each varying over every mesh axis that one of them varies over.

    Outside shard_map nothing happens. Inside, the transpose of this cast is the sum over devices
    that the gradient of a replicated weight needs.
    """
    arrays = jax.tree.map(jnp.asarray, operands)
    axes = frozenset().union(*map(_axes, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda array: _vary(array, axes), arrays)


def varying_like(zeros: Array, array: Array) -> Array:
    """`zeros` with the type that a loop over `array` gives its carry inside shard_map."""
    return _vary(zeros, _axes(array))


def _vary(array: Array, axes: frozenset) -> Array:
    missing = tuple(axes - _axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array


def _axes(array: Array) -> frozenset:
    """The mesh axes over which an array varies inside shard_map."""
    return jax.typeof(array).manual_axis_type.varying


_per_platform = Primitive("per_platform")
_per_platform.multiple_results = True


@_per_platform.def_abstract_eval
def _shapes(*arrays, out, ways):
    mesh, axes = arrays[0].sharding.mesh, arrays[0].manual_axis_type
    return [
        ShapedArray(
            one.shape,
            one.dtype,
            sharding=NamedSharding(mesh, P(*[None] * len(one.shape))),
            manual_axis_type=axes,
        )
        for one in out
    ]


def _lower(platform: str):
    def chosen(*arrays, out, ways):
        ways = dict(ways)
        return ways.get(platform, ways[""])(*arrays)

    return mlir.lower_fun(chosen, multiple_results=True)


mlir.register_lowering(_per_platform, _lower(""))
for _platform in ("cpu", "tpu", "cuda", "rocm"):
    mlir.register_lowering(_per_platform, _lower(_platform), platform=_platform)
_per_platform.def_impl(
    lambda *arrays, **params: jax.jit(partial(_per_platform.bind, **params))(*arrays)
)


def _batch(arrays, axes, *, out, ways):
    ways = dict(ways)
    results = jax.vmap(ways.get("cpu", ways[""]), in_axes=tuple(axes))(*arrays)
    return list(results), [0] * len(results)


batching.primitive_batchers[_per_platform] = _batch

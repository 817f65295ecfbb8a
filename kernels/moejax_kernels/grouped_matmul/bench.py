"""Measures backends against each other: python -m moejax_kernels.grouped_matmul.bench [names].

Contenders take turns in one process, so that other load on the machine meets all of them; the
table gives the median time and the median of the ratios within a turn. `dense` is one matmul of
the same flops with a single expert: the limit at prefill, while at decode it reads fewer weights.
A backend that would need E times the flops runs only where it ends soon. Shapes whose weights
exceed --memory are cut in E, rows in proportion, and marked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax_kernels.grouped_matmul.api import grouped_matmul
from moejax_kernels.shapes import REFERENCE, SHAPES, Shape

_SLOW_LIMIT = 50e9  # flops of one call of a backend that computes every expert for every row


def contenders(backward: bool) -> dict[str, Callable[[Array, Array, Array], object]]:
    """Compiled calls by name; with `backward` they also return the gradients of x and w."""

    def product(x: Array, w: Array, sizes: Array, backend: str) -> Array:
        return grouped_matmul(x, w, sizes, backend=backend)

    def dense(x: Array, w: Array, sizes: Array) -> Array:
        return x @ w[0]

    def timed(call: Callable) -> Callable:
        def with_gradients(x: Array, w: Array, sizes: Array):
            y, pull_back = jax.vjp(lambda x, w: call(x, w, sizes), x, w)
            return pull_back(y)

        return jax.jit(with_gradients if backward else call)

    names = ("xla", "ragged_dot", "reference")
    return {name: timed(partial(product, backend=name)) for name in names} | {"dense": timed(dense)}


def measure(shape: Shape, *, skew: float, turns: int, backward: bool, dtype: str) -> dict:
    """Contender -> seconds per turn, plus compile seconds under `compile_<name>`."""
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (shape.rows, shape.inputs), dtype)
    w = jax.random.normal(key_w, (shape.experts, shape.inputs, shape.outputs), dtype)
    arrays = (x, w, jnp.asarray(shape.group_sizes(skew)))
    calls = contenders(backward)
    if jax.default_backend() == "cpu" and shape.flops * shape.experts > _SLOW_LIMIT:
        del calls["ragged_dot"], calls["reference"]
    result: dict[str, list[float]] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call(*arrays))
        result[f"compile_{name}"] = [time.perf_counter() - start]
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*arrays))
            result.setdefault(name, []).append(time.perf_counter() - start)
    return result


def cut(shape: Shape, limit: int, itemsize: int) -> Shape:
    """The shape with as many experts as fit in `limit` bytes, rows per expert unchanged."""
    one = shape.inputs * shape.outputs * itemsize
    experts = max(1, min(shape.experts, limit // one))
    if experts == shape.experts:
        return shape
    rows = max(1, shape.rows * experts // shape.experts)
    name = f"{shape.name} (E={experts})"
    return shape._replace(name=name, tokens=rows, chosen=1, experts=experts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of medians and interleaved ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("names", nargs="*", help=f"shapes: {', '.join(names)}")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--memory", type=float, default=1.0, help="GB of weights per shape")
    options = parser.parse_args(arguments)
    wanted = options.names or [REFERENCE.gate(4096).name]
    if set(wanted) - set(names):
        parser.error(f"unknown shapes {sorted(set(wanted) - set(names))}; known: {names}")
    print(f"{jax.default_backend()}, {jax.devices()[0].device_kind}, {options.dtype}")
    print(f"{'shape':24}{'backend':12}{'ms':>10}{'GFLOP/s':>10}{'x dense':>9}{'compile s':>11}")
    for shape in (shape for shape in SHAPES if shape.name in wanted):
        shape = cut(shape, int(options.memory * 1e9), jnp.dtype(options.dtype).itemsize)
        times = measure(
            shape,
            skew=options.skew,
            turns=options.turns,
            backward=options.backward,
            dtype=options.dtype,
        )
        flops = shape.flops * (3 if options.backward else 1)
        for name in (name for name in times if not name.startswith("compile_")):
            median = float(np.median(times[name]))
            ratio = float(np.median(np.divide(times[name], times["dense"])))
            print(
                f"{shape.name:24}{name:12}{1e3 * median:10.2f}{flops / median / 1e9:10.1f}"
                f"{ratio:9.2f}{times[f'compile_{name}'][0]:11.1f}"
            )


if __name__ == "__main__":
    main()

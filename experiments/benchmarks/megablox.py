"""JAX's megablox as a contender: all sensible tilings, priced for given group sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from moejax_kernels import aot
from moejax_kernels.chips import Chip
from moejax_kernels.shapes import Shape

Tiling = tuple[int, int, int]
_VMEM = 16 * 2**20  # what the compiler grants a kernel that does not ask for more


def cases(shape: Shape, chip: Chip, sizes: np.ndarray, first: int = 8) -> Iterator[aot.Case]:
    """The best tilings by an optimistic price, which knows nothing of the code of a step."""
    tilings = sorted(tilings_of(shape, chip), key=lambda tiling: _least(shape, chip, tiling, sizes))
    for tiling in tilings[:first]:
        yield case(shape, tiling)


def case(shape: Shape, tiling: Tiling) -> aot.Case:
    """megablox at one tiling, in bfloat16."""
    shapes = (
        jax.ShapeDtypeStruct((shape.rows, shape.inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.experts, shape.inputs, shape.outputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.experts,), jnp.int32),
    )
    call = partial(gmm, preferred_element_type=jnp.bfloat16, tiling=tiling)
    return aot.Case(
        name="megablox " + "x".join(map(str, tiling)),
        shape=shape,
        program=aot.Program(call, shapes),
        kernel="gmm",
        counts=partial(_counts, shape, tiling),
        hbm_bytes=partial(traffic, shape, tiling),
        least_bytes=lambda sizes: aot.least_bytes(shape, sizes, 2),
    )


def tilings_of(shape: Shape, chip: Chip) -> list[Tiling]:
    """Tilings that fit: rows that divide, multiples of the matrix unit, or all of K or N."""
    rows = [t for t in (16, 32, 64, 128, 256, 512) if shape.rows % t == 0] or [shape.rows]
    inner = sorted({min(t, shape.inputs) for t in (256, 512, 1024, 2048, 4096, shape.inputs)})
    outer = sorted({min(t, shape.outputs) for t in (256, 512, 1024, 2048, shape.outputs)})

    def fits(tiling: Tiling) -> bool:
        m, k, n = tiling
        return 2 * 2 * (m * k + k * n + m * n) + 4 * m * n <= _VMEM

    return [tiling for tiling in product(rows, inner, outer) if fits(tiling)]


def visits(sizes: np.ndarray, rows: int) -> np.ndarray:
    """int [experts]: row tiles that a group touches; a tile of two groups is computed twice."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    return np.where(sizes > 0, -(-ends // rows) - starts // rows, 0)


def traffic(shape: Shape, tiling: Tiling, sizes: np.ndarray) -> float:
    """Bytes that the pipeline copies: a block is loaded anew when its index changes."""
    m, k, n = tiling
    tiles_n, one_k = -(-shape.outputs // n), k >= shape.inputs
    seen = visits(sizes, m)
    used_tiles = shape.rows // m
    x_loads = used_tiles if one_k else seen.sum()
    w_loads = np.count_nonzero(sizes) if one_k else seen.sum()
    x = tiles_n * x_loads * m * shape.inputs
    w = w_loads * shape.inputs * shape.outputs
    return 2.0 * (x + w + shape.rows * shape.outputs)


def _counts(
    shape: Shape, tiling: Tiling, schedule: aot.Schedule, sizes: np.ndarray
) -> dict[str, int]:
    m, k, n = tiling
    tiles_k = -(-shape.inputs // k)
    last = int(visits(sizes, m).sum()) * -(-shape.outputs // n)  # steps with the last tile of K
    steps = last * tiles_k
    loops = [region for region in schedule.root.walk() if region.is_loop]
    if any(region.pipelined for region in schedule.root.walk()):
        counts = schedule.grid(steps)
    else:  # tokamax prefetches in front of the loop
        counts = {loops[0].path: steps}
    (loop,) = counts
    guards = [
        region
        for region in schedule.regions[loop].walk()
        if not region.is_loop and not region.pipelined and not region.children
    ]

    def work(region: aot.Region) -> float:
        return float(schedule.matmul[schedule.own(region)].sum())

    # One product masks and stores at the end of K, and therefore has more vector code.
    vector = schedule.kinds.index("VALU")
    products = sorted(
        (region for region in guards if work(region)),
        key=lambda region: -schedule.slots[schedule.own(region), vector].sum(),
    )
    for region in guards:
        counts[region.path] = last  # zeros at the start of K
    for region, times in zip(products, (last, last * (tiles_k - 1)), strict=False):
        counts[region.path] = times
    return counts


def _least(shape: Shape, chip: Chip, tiling: Tiling, sizes: np.ndarray) -> float:
    m, _, _ = tiling
    rows = int(visits(sizes, m).sum()) * max(m, chip.size)  # fewer rows do not load weights faster
    cycles = 2 * rows * shape.inputs * shape.outputs / chip.flops_per_cycle
    steps = rows / m * -(-shape.outputs // tiling[2]) * -(-shape.inputs // tiling[1])
    return max(cycles + 100 * steps, traffic(shape, tiling, sizes) / chip.bytes_per_cycle)

"""What the benchmark compiles and prices: gate, up and activation in one TPU kernel, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax_kernels import aot
from moejax_kernels.chips import Chip
from moejax_kernels.gated_grouped_matmul import pallas_tpu
from moejax_kernels.grouped_matmul import modelled
from moejax_kernels.grouped_matmul.tiles import Tiles, tiles_for
from moejax_kernels.shapes import Shape


def tpu(shape: Shape, chip: Chip) -> Iterator[aot.Case]:
    """The fused product of a shape D -> F, with the tiles that the op would choose on the chip."""
    if not shape.name.endswith("/gate"):
        return
    sides = modelled.sides("forward", shape)
    tiles = tiles_for(
        "forward", shape.rows, *sides, shape.experts, jnp.bfloat16, operands=2, chip=chip
    )
    array: Any = jax.ShapeDtypeStruct
    w = array((shape.experts, *sides), jnp.bfloat16)
    x, sizes = array((shape.rows, shape.inputs), w.dtype), array((shape.experts,), jnp.int32)

    def call(x, gate, up, sizes):
        return pallas_tpu.forward(x, gate, up, sizes, 0, jax.nn.silu, tiles=tiles)

    yield aot.Case(
        name="ours gated bf16",
        shape=shape._replace(outputs=2 * shape.outputs),  # the flops of both products
        program=aot.Program(call, (x, w, w, sizes)),
        kernel="grouped_matmul",
        counts=partial(modelled.counts, "forward", shape, tiles),
        hbm_bytes=partial(_traffic, shape, tiles),
        least_bytes=partial(aot.least_bytes, shape, bytes_per_weight=4),
    )


def _traffic(shape: Shape, tiles: Tiles, sizes: np.ndarray) -> float:
    """Those of one product, and the second bank."""
    columns = modelled.slices_of("forward", shape, tiles) * min(tiles.columns, shape.outputs)
    second = 2 * np.count_nonzero(sizes) * shape.inputs * columns
    return float(modelled.traffic("forward", shape, tiles, sizes) + second)

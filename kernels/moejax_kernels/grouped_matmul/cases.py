"""What the benchmark compiles and prices: this op's TPU kernels in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp

from moejax_kernels import aot
from moejax_kernels.chips import Chip
from moejax_kernels.grouped_matmul import modelled
from moejax_kernels.grouped_matmul.tiles import Tiles, tiles_for
from moejax_kernels.shapes import Shape

NAMES = {"forward": "ours bf16", "transposed": "ours bf16, dx", "weights": "ours bf16, dw"}


def tpu(shape: Shape, chip: Chip) -> Iterator[aot.Case]:
    """The product and its two gradients with the tiles that the op would choose on the chip."""
    for kernel in NAMES:
        sides = modelled.sides(kernel, shape)
        tiles = tiles_for(kernel, shape.rows, *sides, shape.experts, jnp.bfloat16, chip=chip)
        yield case(kernel, shape, tiles)


def case(kernel: str, shape: Shape, tiles: Tiles) -> aot.Case:
    """One kernel ("forward", "transposed" or "weights") at given tiles, on one core."""
    return aot.Case(
        name=NAMES[kernel],
        shape=shape,
        program=modelled.program(kernel, shape, tiles),
        kernel="grouped_matmul_dw" if kernel == "weights" else "grouped_matmul",
        counts=partial(modelled.counts, kernel, shape, tiles),
        hbm_bytes=partial(modelled.traffic, kernel, shape, tiles),
        least_bytes=partial(aot.least_bytes, shape, bytes_per_weight=2),
    )

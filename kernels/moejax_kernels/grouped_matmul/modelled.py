"""What a call of the TPU kernels costs by the compiler's schedule, for given group sizes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax_kernels import aot
from moejax_kernels.grouped_matmul import blocks, pallas_tpu, pallas_tpu_dw
from moejax_kernels.grouped_matmul.blocks import UNIT, Blocks
from moejax_kernels.grouped_matmul.tiles import Tiles, round_up
from moejax_kernels.shapes import Shape


def plan(kernel: str, tiles: Tiles, sizes: np.ndarray) -> Blocks:
    """The row blocks of these groups, all of them held; kernel: see `tiles_for`."""
    found = blocks.cut(
        jnp.asarray(sizes),
        0,
        len(sizes),
        round_up(int(sizes.sum()), UNIT),
        tiles.heights,
        tiles.ramp,
        visit_empty=kernel == "weights",
    )
    return jax.tree.map(np.asarray, found)


def compute_regions(schedule: aot.Schedule) -> list[aot.Region]:
    """The guarded code of each height, in the order of the menu."""

    def works(region: aot.Region) -> bool:
        return bool(schedule.matmul[region.start : region.stop].any())

    inner = schedule.root
    while len(busy := [child for child in inner.children if works(child)]) == 1:
        inner = busy[0]  # the loop over slices, then the loop over blocks
    return busy


def sides(kernel: str, shape: Shape) -> tuple[int, int]:
    """Inputs and outputs of the kernel's product; "transposed" maps outputs to inputs."""
    turned = kernel == "transposed"
    return (shape.outputs, shape.inputs) if turned else (shape.inputs, shape.outputs)


def program(kernel: str, shape: Shape, tiles: Tiles, dtype=jnp.bfloat16) -> aot.Program:
    """One call of a kernel at the operands of `shape`."""
    inputs, outputs = sides(kernel, shape)
    rows_in = jax.ShapeDtypeStruct((shape.rows, inputs), dtype)
    w = jax.ShapeDtypeStruct((shape.experts, shape.inputs, shape.outputs), dtype)
    sizes = jax.ShapeDtypeStruct((shape.experts,), jnp.int32)
    if kernel == "weights":
        rows_out = jax.ShapeDtypeStruct((shape.rows, outputs), dtype)
        call = partial(
            pallas_tpu_dw.weight_gradient, experts=shape.experts, dtype=dtype, tiles=tiles
        )
        return aot.Program(call, (rows_in, rows_out, sizes))

    def product(rows, w, sizes):
        turned = kernel == "transposed"
        return pallas_tpu.forward(rows, (w,), sizes, transposed=turned, tiles=tiles)

    return aot.Program(product, (rows_in, w, sizes))


def counts(
    kernel: str, shape: Shape, tiles: Tiles, schedule: aot.Schedule, sizes: np.ndarray
) -> dict[str, int]:
    """Executions of the regions that depend on data, for one core that does all slices."""
    found = plan(kernel, tiles, sizes)
    slices = slices_of(kernel, shape, tiles)
    busy = compute_regions(schedule)
    loop_of_blocks = busy[0].path.rpartition("/")[0]
    result = {}
    for region in schedule.root.walk():
        if region.is_loop and region.trips is None:
            around = loop_of_blocks.startswith(region.path + "/")
            steps = int(found.count) if region.path == loop_of_blocks else 0  # 0: rows of zeros
            result[region.path] = slices * (1 if around else steps)
    used = found.height_B[: found.count]
    for index, region in enumerate(busy):
        result[region.path] = slices * int((used == index).sum())
    return result


def slices_of(kernel: str, shape: Shape, tiles: Tiles) -> int:
    """Slices of columns, the last of which may overlap its neighbour."""
    return -(-sides(kernel, shape)[1] // tiles.columns)


def traffic(kernel: str, shape: Shape, tiles: Tiles, sizes: np.ndarray, itemsize: int = 2) -> float:
    """HBM bytes: every copy of the kernel, as high as it is, as often as it is made."""
    found = plan(kernel, tiles, sizes)
    inputs, outputs = sides(kernel, shape)
    slices = slices_of(kernel, shape, tiles)
    columns = slices * min(tiles.columns, outputs)
    heights = (found.hi_B[: found.count] + UNIT - 1) // UNIT * UNIT
    rows_in, rows_out = int(heights.sum()), round_up(int(sizes.sum()), UNIT)
    matrices = int(found.visited) * inputs * columns
    if kernel == "weights":
        return itemsize * (matrices + rows_in * (slices * inputs + columns))
    return itemsize * (matrices + slices * rows_in * inputs + rows_out * columns)

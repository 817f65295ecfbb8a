"""What a call of the TPU kernels costs by the compiler's schedule, for given group sizes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moejax_kernels.aot import Region, Schedule
from moejax_kernels.grouped_matmul import blocks
from moejax_kernels.grouped_matmul.blocks import UNIT, Blocks
from moejax_kernels.grouped_matmul.tiles import Tiles, round_up


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
    return Blocks(*map(np.asarray, found))


def compute_regions(schedule: Schedule) -> list[Region]:
    """The guarded code of each height, in the order of the menu."""

    def works(region: Region) -> bool:
        return bool(schedule.matmul[region.start : region.stop].any())

    inner = schedule.root
    while len(busy := [child for child in inner.children if works(child)]) == 1:
        inner = busy[0]  # the loop over slices, then the loop over blocks
    return busy


def counts(
    schedule: Schedule, kernel: str, tiles: Tiles, outputs: int, sizes: np.ndarray
) -> dict[str, int]:
    """Executions of the regions that depend on data, for one core that does all slices."""
    found = plan(kernel, tiles, sizes)
    slices = -(-outputs // min(tiles.columns, outputs))
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


def traffic(
    kernel: str,
    tiles: Tiles,
    inputs: int,
    outputs: int,
    sizes: np.ndarray,
    *,
    itemsize: int = 2,
    operands: int = 1,
) -> float:
    """HBM bytes: every copy of the kernel, as high as it is, as often as it is made."""
    found = plan(kernel, tiles, sizes)
    slices = -(-outputs // min(tiles.columns, outputs))
    columns = slices * min(tiles.columns, outputs)
    heights = (found.hi_B[: found.count] + UNIT - 1) // UNIT * UNIT
    rows_in, rows_out = int(heights.sum()), round_up(int(sizes.sum()), UNIT)
    matrices = int(found.visited) * inputs * columns * operands
    if kernel == "weights":
        return itemsize * (matrices + rows_in * (slices * inputs + columns))
    return itemsize * (matrices + slices * rows_in * inputs + rows_out * columns)

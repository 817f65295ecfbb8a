"""Searches tiles: python -m moejax_kernels.grouped_matmul.tune v6e mixtral/4096/gate.

Where the chip is attached, candidates are timed. Elsewhere they are ranked by the compiler's
schedule: cycles, or HBM bytes where those take longer (moejax_kernels.aot; nothing is measured).
The menu of heights is chosen from a line through the cycles of three heights, then compiled.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax_kernels import aot
from moejax_kernels.chips import CHIPS, Chip
from moejax_kernels.grouped_matmul import modelled
from moejax_kernels.grouped_matmul.blocks import UNIT, cover
from moejax_kernels.grouped_matmul.cases import case as case_of
from moejax_kernels.grouped_matmul.pallas_tpu import row_pieces
from moejax_kernels.grouped_matmul.tiles import (
    Tiles,
    attached_chip,
    rule,
    table_key,
)
from moejax_kernels.shapes import SHAPES, ZIPF, Shape

KERNELS = ("forward", "transposed", "weights")
MENU = 5  # heights, each of which is code of its own
TALLEST = 544  # rows of a block
MOST_SUMS = 256 * 144  # float32 sums of a piece of rows; with more, registers spill
SAMPLES = 2  # draws of group sizes per skew


def draws(shape: Shape) -> list[np.ndarray]:
    """Group sizes that the search minds: balanced and skewed, other seeds than the benchmark's."""
    seeds = range(1, SAMPLES + 1)
    return [shape.group_sizes(skew, seed) for seed in seeds for skew in (0, ZIPF)]


def price(case: aot.Case, schedule: aot.Schedule) -> float:
    """Mean modelled cycles over the draws."""
    priced = []
    for sizes in draws(case.shape):
        counts, traffic = case.counts(schedule, sizes), case.hbm_bytes(sizes)
        priced.append(aot.cost(schedule, counts, hbm_bytes=traffic).modelled)
    return float(np.mean(priced))


def block_cycles(schedule: aot.Schedule) -> np.ndarray:
    """Cycles of one block of each height, its share of the loop around it included."""

    def whole(region: aot.Region) -> float:
        inside = sum(whole(child) for child in region.children)
        return (schedule.once(region) + inside) * (region.trips or 1)

    busy = modelled.compute_regions(schedule)
    loop = schedule.regions[busy[0].path.rpartition("/")[0]]
    return np.array([schedule.once(loop) + whole(region) for region in busy])


def with_menu(tiles: Tiles, cycles: np.ndarray, shape: Shape) -> Tiles:
    """The tiles with the heights that cover the draws at least cost.

    A block is taken to cost what a line through (heights, cycles) says.
    """
    slope, base = np.polyfit(tiles.heights, cycles, 1)
    ramp = max(0, round(base / slope))
    sizes = np.concatenate(draws(shape))
    units = np.minimum(
        -(-sizes[sizes > 0] // UNIT) + 1, 4 * TALLEST // UNIT
    )  # a unit for the start
    step = 32 if tiles.heights[0] >= 128 else UNIT
    chosen: tuple[int, ...] = ()
    best = np.inf
    while len(chosen) < MENU:
        priced = []
        for height in range(max(step, tiles.heights[-1]), TALLEST + 1, step):
            if tiles.unit * max(b - a for a, b in row_pieces(height)) > MOST_SUMS:
                continue
            tried = tuple(sorted({*chosen, height}, reverse=True))
            blocks_of = cover(tried, ramp, 4 * TALLEST)[units]
            priced.append((float((blocks_of @ (np.asarray(tried) + ramp)).sum()), tried))
        cheapest, tried = min(priced)
        if cheapest > 0.995 * best:
            break
        best, chosen = cheapest, tried
    return tiles._replace(heights=chosen, ramp=ramp)


def tune(kernel: str, shape: Shape, chip: Chip) -> tuple[Tiles, float]:
    """The best tiles found, and their cost: modelled cycles, or measured seconds on the chip."""
    measured = jax.default_backend() == "tpu" and attached_chip() == chip

    def ranked(tried: Sequence[Tiles]) -> list[tuple[float, Tiles, aot.Schedule]]:
        cases = [case_of(kernel, shape, tiles) for tiles in tried]
        programs = {str(index): case.program for index, case in enumerate(cases)}
        reports = aot.compile_all(programs, chip=chip, keep_failures=True)
        found = []
        for tiles, case, report in zip(tried, cases, reports.values(), strict=True):
            if isinstance(report, aot.CompileError):
                continue  # does not fit
            schedule = report.kernel(case.kernel)
            value = seconds(case) if measured else price(case, schedule)
            found.append((value, tiles, schedule))
        return sorted(found, key=lambda entry: entry[0])

    sides = modelled.sides(kernel, shape)
    start = rule(kernel, shape.rows, *sides, shape.experts, jnp.bfloat16, chip=chip)
    shorter = start._replace(chunk=start.chunk // 2)
    tried = [start] if shorter.chunk % chip.size else [shorter, start]  # of equals the shorter
    value, tiles, schedule = ranked(tried)[0]
    refined = with_menu(tiles, block_cycles(schedule), shape)
    better = ranked([refined]) if refined != tiles else []
    if better and better[0][0] < value:
        value, tiles, _ = better[0]
    return tiles, value


def seconds(case: aot.Case) -> float:
    """Median time of a call on the attached device, over the draws."""
    call = jax.jit(case.program.function)
    *abstract, _ = case.program.shapes
    arrays = [jnp.ones(like.shape, like.dtype) for like in abstract]
    times = []
    for sizes in map(jnp.asarray, draws(case.shape) * 5):
        jax.block_until_ready(call(*arrays, sizes))
        start = time.perf_counter()
        jax.block_until_ready(call(*arrays, sizes))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes shapes for a chip and writes the chip's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chip", choices=[name for name, chip in CHIPS.items() if chip.vmem])
    parser.add_argument("names", nargs="+", help="of moejax_kernels.shapes, as olmoe/4096/gate")
    parser.add_argument("--kernels", nargs="+", default=["forward"], choices=KERNELS)
    options = parser.parse_args(arguments)
    chip = CHIPS[options.chip]
    file = Path(__file__).parent / "tuned" / f"{chip.name}.json"
    shapes = {shape.name: shape for shape in SHAPES}
    for name in options.names:
        for kernel in options.kernels:
            shape = shapes[name]
            tiles, value = tune(kernel, shape, chip)
            print(f"{name:24}{kernel:12}{value:14.6g}  {tiles}", flush=True)
            inputs, outputs = modelled.sides(kernel, shape)
            key = table_key(kernel, shape.rows, inputs, outputs, shape.experts, jnp.bfloat16, 1)
            table = json.loads(file.read_text()) if file.exists() else {}
            table[key] = tiles._asdict()
            file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

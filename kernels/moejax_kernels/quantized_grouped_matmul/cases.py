"""Cases of the bench: the kernels at the bits, groups and modes that are compared."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax_kernels import aot
from moejax_kernels.chips import Chip
from moejax_kernels.grouped_matmul import modelled
from moejax_kernels.grouped_matmul.tiles import Tiles, rule
from moejax_kernels.quantized_grouped_matmul import pallas_tpu, pallas_tpu_prefill
from moejax_kernels.quantized_grouped_matmul.layout import WORD
from moejax_kernels.quantized_grouped_matmul.reference import Leaves
from moejax_kernels.shapes import Shape

GROUP = 128
MOST_TOKENS = 64  # of decode, whose kernel multiplies raw codes


class Variant(NamedTuple):
    """What is measured: bits of a code, zeros or not, rank of the addend, bits of activations."""

    bits: int
    zeros: bool = False
    rank: int = 0
    activation_bits: int | None = None

    @property
    def name(self) -> str:
        """As tables show it."""
        name = f"ours int{self.bits} g{GROUP}"
        name += " zeros" if self.zeros else ""
        name += f" + rank {self.rank}" if self.rank else ""
        return name + (f" a{self.activation_bits}" if self.activation_bits else "")


VARIANTS = (
    *(Variant(bits) for bits in (8, 4, 3, 2)),
    Variant(4, zeros=True),
    Variant(3, rank=32),
    *(Variant(bits, activation_bits=16) for bits in (4, 3, 2)),
    *(Variant(bits, activation_bits=8) for bits in (4, 3, 2)),
    Variant(3, activation_bits=24),
)


PREFILL = (Variant(8), Variant(4, zeros=True), Variant(3))


def tpu(shape: Shape, chip: Chip) -> Iterator[aot.Case]:
    """The kernels' cases for a shape: of decode, or of prefill with the gradient of x."""
    if shape.inputs % GROUP:
        return
    if shape.tokens > MOST_TOKENS:
        for variant in PREFILL:
            if pallas_tpu_prefill.fits(_leaves(shape, variant), variant.bits):
                yield prefill(shape, variant, chip)
        if pallas_tpu_prefill.fits(_leaves(shape, Variant(4)), 4):
            yield prefill(shape, Variant(4), chip, transposed=True)
        return
    for variant in VARIANTS:
        if _tiles(shape, variant) is not None:
            yield case(shape, variant)


def case(shape: Shape, variant: Variant) -> aot.Case:
    """One variant of decode at one shape."""
    leaves = _leaves(shape, variant)
    array: Any = jax.ShapeDtypeStruct
    x = array((shape.rows, shape.inputs), jnp.bfloat16)

    def call(x, leaves, sizes):
        options = {"bits": variant.bits, "activation_bits": variant.activation_bits}
        return pallas_tpu.forward(x, leaves, sizes, 0, **options)

    return aot.Case(
        name=variant.name,
        shape=shape,
        program=aot.Program(call, (x, leaves, array((shape.experts,), jnp.int32))),
        kernel="quantized_grouped_matmul",
        counts=partial(_counts, shape, variant),
        hbm_bytes=lambda sizes: (
            _bank_bytes(shape, variant, sizes) + _activation_bytes(shape, variant)
        ),
        least_bytes=lambda sizes: (
            _bank_bytes(shape, variant, sizes) + 2 * shape.rows * (shape.inputs + shape.outputs)
        ),
    )


def _leaves(shape: Shape, variant: Variant) -> Leaves:
    """Shapes of the experts: float16 scales, uint8 zeros, bfloat16 factors."""
    experts, groups = shape.experts, shape.inputs // GROUP
    array: Any = jax.ShapeDtypeStruct
    scales = (experts, groups, shape.outputs)
    return Leaves(
        array((experts, shape.inputs * variant.bits // WORD, shape.outputs), jnp.uint32),
        array(scales, jnp.float16),
        array(scales, jnp.uint8) if variant.zeros else None,
        array((experts, shape.inputs, variant.rank), jnp.bfloat16) if variant.rank else None,
        array((experts, variant.rank, shape.outputs), jnp.bfloat16) if variant.rank else None,
    )


def prefill(shape: Shape, variant: Variant, chip: Chip, transposed: bool = False) -> aot.Case:
    """One variant of prefill (transposed: its gradient of x) with the tiles of the rule."""
    kernel = "transposed" if transposed else "forward"
    sides = modelled.sides(kernel, shape)
    tiles = rule(kernel, shape.rows, *sides, shape.experts, jnp.bfloat16, chip=chip)
    tiles = pallas_tpu_prefill.whole_chunks(tiles, variant.bits, sides[1], transposed)
    array: Any = jax.ShapeDtypeStruct

    def call(rows, leaves, sizes):
        options = {"bits": variant.bits, "transposed": transposed, "tiles": tiles}
        return pallas_tpu_prefill.forward(rows, leaves, sizes, 0, **options)

    rows = array((shape.rows, sides[0]), jnp.bfloat16)
    sizes = array((shape.experts,), jnp.int32)
    return aot.Case(
        name=variant.name + (", dx" if transposed else ""),
        shape=shape,
        program=aot.Program(call, (rows, _leaves(shape, variant), sizes)),
        kernel="grouped_matmul",
        counts=partial(_prefill_counts, kernel, shape, tiles),
        hbm_bytes=partial(_prefill_bytes, kernel, shape, variant, tiles),
        least_bytes=lambda sizes: (
            _bank_bytes(shape, variant, sizes) + 2 * shape.rows * (shape.inputs + shape.outputs)
        ),
    )


def _prefill_bytes(
    kernel: str, shape: Shape, variant: Variant, tiles: Tiles, sizes: np.ndarray
) -> float:
    """Copies of the kernel, scales and zeros as float32 and for dx once a slice; x put in order."""
    rows = modelled.traffic(kernel, shape, tiles, sizes)
    inputs, outputs = modelled.sides(kernel, shape)
    slices = modelled.slices_of(kernel, shape, tiles)
    visited = np.count_nonzero(sizes)
    rows -= 2 * visited * inputs * slices * min(tiles.columns, outputs)  # a bfloat16 bank
    weights = shape.inputs * shape.outputs
    scales = 4 * weights // GROUP * (2 if variant.zeros else 1)
    scales *= slices if kernel == "transposed" else 1
    ordered = 2 * 2 * shape.rows * shape.inputs  # read and written again
    return float(rows + visited * (weights * variant.bits / 8 + scales) + ordered)


def _prefill_counts(
    kernel: str, shape: Shape, tiles: Tiles, schedule: aot.Schedule, sizes: np.ndarray
) -> dict[str, int]:
    """Those of the plain kernel; the first guard of a block decodes, once per slice and group."""
    counts = modelled.counts(kernel, shape, tiles, schedule, sizes)
    loop = modelled.compute_regions(schedule)[0].path.rpartition("/")[0]
    guard = next(child for child in schedule.regions[loop].children if not child.is_loop)
    visited = int(np.count_nonzero(sizes))
    return counts | {guard.path: modelled.slices_of(kernel, shape, tiles) * visited}


def _tiles(shape: Shape, variant: Variant) -> pallas_tpu.Tiling | None:
    groups = shape.inputs // GROUP
    return pallas_tpu.tiling(
        shape.rows, shape.inputs, shape.outputs, shape.experts, groups, variant.bits
    )


def _bank_bytes(shape: Shape, variant: Variant, sizes: np.ndarray) -> float:
    """Codes, scales, zeros and factors of the experts that have rows, once."""
    weights = shape.inputs * shape.outputs
    per_group = 3 if variant.zeros else 2
    factors = 2 * variant.rank * (shape.inputs + shape.outputs)
    one = weights * variant.bits / 8 + weights // GROUP * per_group + factors
    return float(np.count_nonzero(sizes) * one)


def _activation_bytes(shape: Shape, variant: Variant) -> float:
    """What the kernel moves beside the bank: padded rows, their sums, the output."""
    tiles = _tiles(shape, variant)
    assert tiles is not None
    rows = pallas_tpu.padded_rows(shape.rows, tiles.rows)
    digits = (variant.activation_bits or 16) // 8  # bytes of a value
    sums = 4 * pallas_tpu.SUMS * shape.inputs // GROUP * (2 if variant.zeros else 1)
    natural = 2 * shape.inputs if variant.rank else 0
    return float(rows * (digits * shape.inputs + sums + natural) + 2 * shape.rows * shape.outputs)


def _counts(
    shape: Shape, variant: Variant, schedule: aot.Schedule, sizes: np.ndarray
) -> dict[str, int]:
    tiles = _tiles(shape, variant)
    assert tiles is not None
    columns = shape.outputs // tiles.columns
    steps = columns * int((-(-sizes // tiles.rows)).sum())
    counts = schedule.grid(steps)
    (loop,) = counts
    (body,) = (child for child in schedule.regions[loop].children if child.pipelined)
    # The guards of the body: x is widened once, rows are taken per block, outputs written per tile.
    guards = [child.path for child in body.children if not child.is_loop]
    times = (1, columns) if columns == 1 else (1, steps // columns, columns)
    return counts | dict(zip(guards, times, strict=True))

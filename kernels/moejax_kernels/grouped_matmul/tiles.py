"""How a TPU kernel cuts its work: tuned per chip, or by rule.

`tuned/<chip>.json` holds what the tuner (tune.py) found; every other shape follows `rule`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from moejax_kernels.chips import CHIPS, TPU7X, V5P, Chip

LANES = 128


class Tiles(NamedTuple):
    """How one kernel cuts its work.

    columns: width of the slice of an expert that is in VMEM at once (and of the next one's).
    chunk: columns of one straight-line matmul; long code costs compile time, short code restarts
        the matrix unit often.
    heights: row blocks to choose from, descending multiples of 16.
    ramp: what a block costs beside its rows, in rows.
    unit: side of a matrix unit.
    cores: tensor cores that share the column slices. vmem: bytes the kernel may take.
    """

    columns: int
    chunk: int
    heights: tuple[int, ...]
    ramp: int
    unit: int
    cores: int
    vmem: int


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def attached_chip() -> Chip:
    """The TPU of the mesh in use, else the one that JAX computes on.

    Where there is neither, a chip whose VMEM is the least of all: its tiles run on every chip.
    """
    device = get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    kind = device.device_kind if device is not None else ""
    return CHIPS.get(_CHIP_OF_KIND.get(kind, ""), min(V5P, TPU7X, key=lambda chip: chip.vmem))


_MEGACORE = (V5P,)  # two cores that JAX shows as one device; those of tpu7x are two devices
_CHIP_OF_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def tiles_for(
    kernel: str,
    rows: int,
    inputs: int,
    outputs: int,
    groups: int,
    dtype,
    *,
    operands: int = 1,
    chip: Chip | None = None,
) -> Tiles:
    """Tuned tiles if the chip's table has the shape, else those of `rule`.

    kernel: "forward", "transposed" or "weights". inputs, outputs: of the product, multiples of 128
    ("weights": the two sides of a matrix). operands: weights read side by side.
    """
    chip = chip or attached_chip()
    key = table_key(kernel, rows, inputs, outputs, groups, dtype, operands)
    found = table(chip.name).get(key)
    if found is not None:
        return Tiles(**{**found, "heights": tuple(found["heights"])})
    return rule(kernel, rows, inputs, outputs, groups, dtype, operands=operands, chip=chip)


def table_key(kernel, rows, inputs, outputs, groups, dtype, operands) -> str:
    """Shapes whose mean group lies between the same powers of two share an entry."""
    mean = max(1, rows // groups).bit_length()
    return f"{kernel} {inputs}x{outputs} x{operands} {jnp.dtype(dtype).name} rows<2^{mean}"


@cache
def table(chip: str) -> dict[str, dict]:
    """The chip's tuned entries, empty where it has none."""
    file = resources.files("moejax_kernels.grouped_matmul") / "tuned" / f"{chip}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def rule(
    kernel: str,
    rows: int,
    inputs: int,
    outputs: int,
    groups: int,
    dtype,
    *,
    operands: int = 1,
    chip: Chip,
) -> Tiles:
    """Tiles for any shape: as wide a slice as VMEM holds, code of about two thousand cycles."""
    size = jnp.dtype(dtype).itemsize
    cores = chip.cores if chip in _MEGACORE else 1
    vmem = chip.vmem * 7 // 8
    budget = vmem * 7 // 8  # the compiler wants some for itself
    passes = 1 if jnp.dtype(dtype) == jnp.bfloat16 else 6  # of the unit, for float32
    work = passes * operands * inputs  # per row and column
    heights = _heights(kernel, rows // groups, chip)
    heights = tuple(h for h in heights if h == heights[-1] or h * work <= _CODE // 256)
    narrowest = min(outputs, 2 * LANES)
    for tallest in heights[:-1]:
        if _bytes(kernel, tallest, inputs, narrowest, size, operands) > budget:
            heights = heights[1:]

    def fits(columns: int) -> bool:
        return _bytes(kernel, heights[0], inputs, columns, size, operands) <= budget

    most = round_up(outputs, LANES) // LANES
    widths = [
        round_up(-(-outputs // slices), LANES) for slices in range(cores, max(cores, most) + 1)
    ]
    fitting = [columns for columns in widths if fits(columns)] or [LANES]
    # A slice more costs another pass over x; columns done twice cost as much of everything.
    columns = min(fitting[:4], key=lambda columns: -(-outputs // columns) * columns)
    # Blocks of few rows wait for HBM, not for the unit: short code, compiled in a moment.
    chunk = _chunk(columns, (heights[0] if heights[0] >= 128 else 512) * work, chip)
    ramp = 48 if chip.size == 256 else 2
    return Tiles(columns, chunk, heights, ramp, chip.size, cores, vmem)


def _heights(kernel: str, mean: int, chip: Chip) -> tuple[int, ...]:
    if kernel == "weights":
        return (512, 256, 128) if mean >= 128 else (128, 32)
    if mean < 48:
        return (64, 16)  # loading weights takes longer than either
    if chip.size == 128:
        return (352, 272, 256, 144, 128, 64)  # add up to every multiple of UNIT from 384 on
    # The latency of the unit, paid per block, is worth some 50 rows; its weights take as long to
    # load as 128 rows take to pass.
    return (544, 512, 384, 256, 128) if mean >= 256 else (256, 192, 128)


_CODE = 1 << 30  # multiply-adds of one straight-line matmul; compile time grows faster than code


def _bytes(kernel: str, height: int, inputs: int, columns: int, size: int, operands: int) -> int:
    if kernel == "weights":
        blocks = 2 * height * (inputs + columns) + height * inputs
        return size * (blocks + 2 * inputs * columns) + 4 * inputs * columns
    buffers = height * inputs + operands * inputs * columns + height * columns
    return 2 * size * buffers + size * 144 * columns


def _chunk(columns: int, work_per_column: int, chip: Chip) -> int:
    """The width that passes over the columns fastest, among those of bounded code."""
    # A unit of side 128 is busy for so long that restarting it costs nothing.
    limit = max(2 * LANES, _CODE * 3 // 4 * chip.size**2 // 256**2 // work_per_column)
    ramp = (1 << 26 if chip.size == 256 else 1 << 22) // work_per_column  # in columns

    def cost(chunk: int) -> int:
        return -(-columns // chunk) * (round_up(chunk, chip.size) + ramp)

    return min(range(LANES, min(limit, columns) + 1, LANES), key=cost)

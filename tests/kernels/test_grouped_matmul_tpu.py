"""The TPU kernels in Pallas's interpret mode against float64, and their lowering without a TPU."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from moejax_kernels.chips import CHIPS
from moejax_kernels.grouped_matmul import grouped_matmul, pallas_tpu, pallas_tpu_dw
from moejax_kernels.grouped_matmul.blocks import UNIT, cover, cut
from moejax_kernels.grouped_matmul.tiles import Tiles, table, tiles_for

R, K, N, E = 150, 100, 300, 3  # no multiple of a lane, of a unit or of a tile
# Two slices of columns, the last moved back to fit; two chunks per slice; the tallest block is cut
# in two pieces.
TILES = Tiles(256, 128, (256, 32, 16), 100, 128, 1, 16 << 20)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def groups(sizes, offset, rows=R):
    """(expert, first row, end row) of each expert with a group."""
    ends = np.minimum(np.cumsum(sizes), rows)
    for g, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if 0 <= g - offset < E:
            yield g - offset, start, end


def oracle(x, w, dy, sizes, offset):
    """float64 y, dx and dw from the definition."""
    x, w, dy = (np.nan_to_num(np.asarray(a, np.float64)) for a in (x, w, dy))
    y, dx, dw = np.zeros((R, N)), np.zeros((R, K)), np.zeros((E, K, N))
    for e, start, end in groups(sizes, offset):
        y[start:end] = x[start:end] @ w[e]
        dx[start:end] = dy[start:end] @ w[e].T
        dw[e] = x[start:end].T @ dy[start:end]
    return y, dx, dw


@jax.jit
def products(x, w, dy, sizes, offset):
    """y, dx, dw; sizes and offset are traced, so that one compile serves all cases."""
    y = pallas_tpu.forward(x, (w,), sizes, offset, tiles=TILES)
    dx = pallas_tpu.forward(dy, (w,), sizes, offset, transposed=True, tiles=TILES)
    dw = pallas_tpu_dw.weight_gradient(x, dy, sizes, offset, experts=E, dtype=w.dtype, tiles=TILES)
    return y, dx, dw


SIZES = {
    "uneven": ([50, 3, 90], 0),
    "empty and tiny": ([0, 1, 0], 0),
    "inside one unit": ([5, 4, 3], 0),
    "no row": ([0, 0, 0], 0),
    "one takes all": ([0, R, 0], 0),
    "aligned": ([16, 64, 48], 0),
    "more rows than there are": ([100, 40, 40], 0),
    "later groups": ([37, 20, 41], 1),
    "groups before the first": ([30, 30, 30], -1),
    "groups beyond the last": ([30, 30, 30], 3),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SIZES)
def test_products(dtype, case):
    """Catches blocks that spill into a neighbour, rows lost between two groups of one sublane tile,
    a gradient of masked rows (NaN here), zeros left out, a copy awaited that never started."""
    sizes, offset = SIZES[case]
    outside = np.ones(R, bool)
    for _, start, end in groups(sizes, offset):
        outside[start:end] = False
    x = normal(0, R, K, dtype=dtype).at[outside].set(jnp.nan)
    dy = normal(2, R, N, dtype=dtype).at[outside].set(jnp.nan)
    w = normal(1, E, K, N, dtype=dtype)
    with pltpu.force_tpu_interpret_mode():
        got = products(x, w, dy, jnp.asarray(sizes, jnp.int32), jnp.int32(offset))
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.01, "atol": 0.1}
    for mine, exact in zip(got, oracle(x, w, dy, sizes, offset), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.float64(mine), exact, **tolerance)


def layer_loss(x, w_LxExKxK, sizes, backend):
    def layer(x, w):
        return jnp.tanh(grouped_matmul(x, w, sizes, backend=backend)), None

    y, _ = jax.lax.scan(layer, x, 0.3 * w_LxExKxK)
    return jnp.square(y).sum()


def test_gradients_through_the_op_under_scan():
    """Catches a custom gradient that swaps its operands, and state kept between two calls."""
    x, w, sizes = normal(0, 40, 8), normal(1, 2, 3, 8, 8), jnp.asarray([20, 0, 17], jnp.int32)
    step = jax.jit(jax.value_and_grad(layer_loss, (0, 1)), static_argnums=3)
    with pltpu.force_tpu_interpret_mode():
        value, got = step(x, w, sizes, "pallas_tpu")
    wanted, want = step(x, w, sizes, "reference")
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def expert_parallel(x, w, sizes, backend, mesh):
    """All rows on every device, experts cut over devices, partial outputs summed."""

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    def block(x, w, sizes):
        first = jax.lax.axis_index("expert") * w.shape[0]
        y = grouped_matmul(x, w, sizes, group_offset=first, backend=backend)
        return jax.lax.psum(y, "expert")

    return jnp.square(block(x, w, sizes)).sum()


def check_expert_parallel(devices, backend):
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, sizes = normal(0, 60, 8), normal(1, 4, 8, 6), jnp.asarray([20, 0, 17, 9], jnp.int32)
    step = jax.jit(jax.value_and_grad(expert_parallel, (0, 1)), static_argnums=(3, 4))
    with pltpu.force_tpu_interpret_mode():
        value, got = step(x, w, sizes, backend, mesh)
    wanted, want = step(x, w, sizes, "reference", mesh)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_inside_shard_map():
    """Catches results without the mesh axes they vary over, and a gradient not summed over them."""
    check_expert_parallel(1, "pallas_tpu")


@pytest.mark.slow
def test_two_devices_hold_half_of_the_experts_each():
    """Catches an offset that is applied to rows, not to groups.

    Of the portable path: Pallas's interpreter of two devices waits for threads that few cores lack.
    """
    code = f"from {__name__} import check_expert_parallel as check; check(2, 'xla')"
    flags = "--xla_force_host_platform_device_count=2"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("backward", [False, True])
def test_the_platform_decides_when_the_program_is_lowered(backward):
    """Catches a TPU program without the kernel, a CPU program with it, and a format that lost out:
    lowering needs neither a TPU nor its compiler."""

    def f(x, w, sizes):
        return grouped_matmul(x, w, sizes, group_offset=jnp.int32(0)).astype(jnp.float32).sum()

    f = jax.grad(f, (0, 1)) if backward else f
    shapes = [((512, 256), "bfloat16"), ((4, 256, 384), "bfloat16"), ((4,), "int32")]
    traced = jax.jit(f).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert on_tpu.count("tpu_custom_call") == (2 if backward else 1)  # the sum needs no forward
    for other in ("cpu", "cuda"):
        assert "tpu_custom_call" not in traced.lower(lowering_platforms=(other,)).as_text()


def test_cover_wastes_little():
    """Catches a menu read in the wrong order and a table off by one: fewer rows, or many more."""
    heights = (288, 256, 192, 128)
    table = cover(heights, 48, 1152)
    rows = table @ np.asarray(heights)
    wanted = UNIT * np.arange(len(table))
    assert (rows >= wanted).all() and table[0].sum() == 0
    assert (rows - wanted)[1:].max() < 128
    assert (table[32] == [0, 2, 0, 0]).all()  # 512 rows


@pytest.mark.parametrize("heights", [(64, 32, 16), (288, 192, 128)])
@pytest.mark.parametrize("visit_empty", [False, True])
def test_blocks_cover_every_row_once(heights, visit_empty):
    """Catches blocks that overlap within a group, or exceed the number that was promised."""
    random = np.random.default_rng(0)
    blocks_of = jax.jit(
        partial(cut, experts=E, rows=4096, visit_empty=visit_empty, ramp=16),
        static_argnames="heights",
    )
    for _ in range(20):
        sizes = random.integers(0, 1500, 5) * random.integers(0, 2, 5)
        offset = int(random.integers(-1, 4))
        blocks = jax.tree.map(np.asarray, blocks_of(sizes, offset, heights=heights))
        assert blocks.count <= len(blocks.row_B)
        owner = np.full(4096, -1)
        for b in range(blocks.count):
            lo, hi = blocks.lo_B[b], blocks.hi_B[b]
            assert blocks.row_B[b] % UNIT == 0 and 0 <= lo < UNIT
            assert hi <= heights[blocks.height_B[b]]
            rows = slice(blocks.row_B[b] + lo, blocks.row_B[b] + hi)
            assert (owner[rows] == -1).all()
            owner[rows] = blocks.expert_E[blocks.rank_B[b]]
        expected = np.full(4096, -1)
        for e, start, end in groups(sizes, offset, 4096):
            expected[start:end] = e
        np.testing.assert_array_equal(owner, expected)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("inputs, outputs", [(2048, 1408), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("kernel", ["forward", "transposed", "weights"])
def test_tiles_fit(chip, inputs, outputs, kernel):
    """Catches tiles that no chip can hold, or that are no multiple of a lane."""
    for rows in (8, 32768):
        tiles = tiles_for(kernel, rows, inputs, outputs, 8, jnp.float32, chip=chip)
        tall = tiles.heights[0]
        matrices = (3 if kernel == "weights" else 2) * inputs * tiles.columns
        buffers = matrices + 2 * tall * (inputs + tiles.columns)
        assert 4 * buffers <= tiles.vmem < chip.vmem
        assert tiles.columns % 128 == 0 and tiles.chunk % 128 == 0
        assert all(height % UNIT == 0 for height in tiles.heights)
        assert list(tiles.heights) == sorted(tiles.heights, reverse=True)


@pytest.mark.parametrize("chip", [chip.name for chip in CHIPS.values()])
def test_tuned_entries_are_tiles(chip):
    """Catches a table that another version of Tiles wrote, or with keys that no call asks for."""
    for key, entry in table(chip).items():
        kernel, sides, operands, dtype, rows = key.split()
        inputs, outputs = map(int, sides.split("x"))
        mean = 2 ** int(rows.removeprefix("rows<2^")) - 1
        shape = (kernel, 8 * mean, inputs, outputs, 8, dtype)
        found = tiles_for(*shape, operands=int(operands[1:]), chip=CHIPS[chip])
        assert found == Tiles(**{**entry, "heights": tuple(entry["heights"])})
